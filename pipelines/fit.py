"""Make a run of a fully fine-tuned checkpoint: the cheapest methods that come near it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pipelines.console import Settings, Transforms, console, failures


def fit(
    spec: Annotated[Path, typer.Argument(help="A spec; its rules are not read.", show_default=False)],
    tuned: Annotated[Path, typer.Option(help="Folder of the fully fine-tuned checkpoint.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the run; made new.", show_default=False)],
    method: Annotated[
        list[str] | None, typer.Option(help="A method to try; any number of times. Default: all.", show_default=False)
    ] = None,
    rank: Annotated[
        list[int] | None, typer.Option(min=1, help="A rank to try; any number of times. Default: 2 and 8.")
    ] = None,
    error: Annotated[
        float, typer.Option(min=0, max=1, help="How near: the distance left, over that of the base, at each weight.")
    ] = 0.5,
    settings: Settings = None,
    transforms: Transforms = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="First delete the run that is in --out.")] = False,
) -> None:
    """Fit methods to what full fine-tuning changed, weight by weight, and make a run of the cheapest within --error.

    Prints parameters and error of every method, which is the smallest ||phi(W) - W*|| over ||W* - W|| of all weights
    together, and with data the metric with that method everywhere; fit.json in the run has the table. Export, run and
    load_adapter take the run.
    """
    with failures(out):
        from rewriter import print_summary
        from rewriter.exchange import fit_to
        from rewriter.report.table import fitted_table

        with console.status("fitting") as status:
            say = status.update if console.is_terminal else console.print  # In a log, a line for each method.
            report = fit_to(
                spec, tuned, out, method or (), rank or (2, 8), error, settings or [], overwrite,
                lambda said: say(escape(said)),
            )  # fmt: skip
        heads, rows = fitted_table(report)
        table = Table(*heads)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        facts = {"weights": len(report["weights"]), "error of all": f"{report['error']:.4f}"}
        if "metric" in report:
            facts[f"validation {report['metric']}"] = f"{report['value']:.4f}"
        if report["not_fitted"]:
            facts["left as in the base"] = ", ".join(report["not_fitted"])
        print_summary("fitted", facts | {"adapter": out / "adapter"}, console)


if __name__ == "__main__":
    typer.run(fit)
