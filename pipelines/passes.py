"""List the passes over the graph, and for a spec what each changes."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from pipelines.console import Settings, Transforms, Without, console, failures, overrides


def passes(
    spec: Annotated[
        Path | None, typer.Argument(help="A spec (YAML): count the nodes that each pass changes.", show_default=False)
    ] = None,
    settings: Settings = None,
    without: Without = None,
    transforms: Transforms = None,
) -> None:
    """List all passes in the order in which they run; for a spec, how many nodes each added, removed or altered.

    Passes that insert what the rules say can't be left out. The others can, by --without NAME or `train.passes: {off:
    [NAME]}` in a spec; those that change numerics run only if `train.passes: {on: [NAME]}` asks for them. No weight is
    read.
    """
    with failures():
        from rewriter.passes.manager import check_names
        from rewriter.passes.pipelines import PASSES

        check_names(without or ())
        counts: dict[str, int] | None = None
        if spec is not None:
            from rewriter import Session

            counts = Session(spec, *overrides(settings, without)).changes()
        table = Table(box=box.SIMPLE_HEAD, header_style="bold")
        for column in ("pass", "when", "numerics", "what it does", *(["nodes"] if counts is not None else [])):
            table.add_column(column, justify="right" if column == "nodes" else "left", overflow="fold")
        for one in PASSES:
            row = [one.name, ", ".join(one.stages), one.numerics, escape(one.doc)]
            table.add_row(*row, *([str(counts.get(one.name, "off"))] if counts is not None else []))
        console.print(table)


if __name__ == "__main__":
    typer.run(passes)
