"""The command `subspan`."""

import typer

from pipelines.combine import combine
from pipelines.data import data
from pipelines.export import export
from pipelines.fit import fit
from pipelines.import_peft import import_peft
from pipelines.passes import passes
from pipelines.plan import plan
from pipelines.push import push
from pipelines.report import report
from pipelines.run import run
from pipelines.schema import schema
from pipelines.show import show
from pipelines.train import train
from pipelines.validate import validate

app = typer.Typer(
    help="Adapt a pretrained model with few parameters and ship it: a spec says which weights get which transform.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the installed command."""
    for command in (
        validate,
        plan,
        data,
        passes,
        show,
        train,
        export,
        run,
        report,
        push,
        import_peft,
        fit,
        combine,
        schema,
    ):
        app.command()(command)
    app()


if __name__ == "__main__":
    main()
