"""Run specs over seeds and put the results in one table. Needs the extra study; processes can share one."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pipelines.console import Settings, console, failures

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
Specs = Annotated[list[Path], typer.Argument(help="Specs; each with a meta.row is a row.", show_default=False)]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Seeds; by default 0.")]
Rows = Annotated[list[str] | None, typer.Option("--row", help="Only these rows.")]
Storage = Annotated[
    str | None, typer.Option(help="postgresql://user:password@host/database; by default the folder's study.db.")
]
Study = Annotated[Path, typer.Option(help="The study's folder: study.db, a run per cell.", show_default=False)]


@app.command()
def run(
    specs: Specs,
    out: Study,
    seeds: Seeds = None,
    row: Rows = None,
    settings: Settings = None,
    name: Annotated[str | None, typer.Option(help="Name of the table; by default the file's.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed cells of these rows again.")] = False,
    storage: Storage = None,
) -> None:
    """Tune every row of the specs with every seed; go on where an earlier or another process is.

    A cell is a row and a seed. Start the same command in as many processes as there is room for: each takes the next
    cell that nobody has. A process that dies is noticed after about 40 seconds; its cell goes on from its checkpoint.
    What is set for all rows goes with a name of its own. On several machines --storage names the database server by
    which they share the cells; each keeps the runs of those that it took in its own folder, or in one that all see.
    """
    with failures(out):
        from pipelines.cells import run_cells

        done = run_cells(specs, out, seeds or [0], row, settings or [], name, retry, storage)
    raise typer.Exit(int(not done))


@app.command()
def plan(
    specs: Specs,
    seeds: Seeds = None,
    row: Rows = None,
    settings: Settings = None,
) -> None:
    """Print what the rows of a study would take, before anything is tuned; no weight is read.

    FLOPs are those of the products of all steps, bytes those of weights, activations and states of a cell.
    """
    with failures():
        from rich.table import Table

        from pipelines.cells import planned

        table = Table("row", "cells", "tuned", "steps of a cell", "TFLOP", "MB")
        found = list(planned(specs, seeds or [0], row, settings or [], None))
        for one in found:
            cells = [f"{one[key]:,}" for key in ("cells", "tuned", "steps")]
            table.add_row(escape(one["row"]), *cells, f"{one['flops'] / 1e12:,.2f}", f"{one['bytes'] / 1e6:,.1f}")
        console.print(table)
        total = {key: sum(one[key] for one in found) for key in ("cells", "flops")}
        steps = sum(one["cells"] * one["steps"] for one in found)
        most = max(one["bytes"] for one in found) if found else 0
        console.print(
            f"{total['cells']:,} cells, {steps:,} steps, {total['flops'] / 1e12:,.1f} TFLOP; "
            f"{most / 1e6:,.1f} MB for the largest",
            highlight=False,
        )


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="The study's folder, or a results.json.", show_default=False)],
    to: Annotated[Path, typer.Option(help="Folder for results.md, results.json and the pictures.")] = Path("docs"),
    storage: Storage = None,
) -> None:
    """Write the tables and the pictures from a study's records."""
    with failures(to):
        from pipelines.results import write_results

        write_results(out, to, storage)


if __name__ == "__main__":
    app()
