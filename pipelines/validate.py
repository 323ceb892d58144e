"""Check specs without loading a weight: the YAML, the rules against the traced model, the data where it is on disk."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pipelines.cli import Settings, console, failures, located
from pipelines.train import plan_of
from rewriter import load_rows, load_spec, print_plan


def validate(
    specs: Annotated[list[Path], typer.Argument(help="Specs (YAML files).", show_default=False)],
    settings: Settings = None,
) -> None:
    """Check specs and print their plans; nothing is written.

    Exit status 0 if all are right, 1 with one line per wrong spec: file, line, column, and what to do.
    """
    wrong = False
    for path in specs:
        try:
            with failures():
                check(path, settings or [])
        except typer.Exit:
            wrong = True
    raise typer.Exit(int(wrong))


def check(path: Path, settings: list[str]) -> None:
    """Raise SubspanError if the spec is wrong; print its plan."""
    spec = load_spec(path, settings)
    with located(spec):
        plan, pretrained = plan_of(spec)
        if spec.data and spec.data.files is not None:
            load_rows(spec, pretrained.labels)
    console.print(f"[bold green]{escape(str(path))}[/] is valid", soft_wrap=True, highlight=False)
    print_plan(plan, console)


if __name__ == "__main__":
    typer.run(validate)
