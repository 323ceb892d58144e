"""Run specs over seeds and put the results in one table. Needs the extra study; processes can share one."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.console import Settings, failures

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
Study = Annotated[Path, typer.Option(help="The study's folder: study.db, a run per cell.", show_default=False)]


@app.command()
def run(
    specs: Annotated[list[Path], typer.Argument(help="Specs; each with a meta.row is a row.", show_default=False)],
    out: Study,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Seeds; by default 0.")] = None,
    row: Annotated[list[str] | None, typer.Option(help="Only these rows.")] = None,
    settings: Settings = None,
    name: Annotated[str | None, typer.Option(help="Name of the table; by default the file's.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed cells of these rows again.")] = False,
) -> None:
    """Tune every row of the specs with every seed; go on where an earlier or another process is.

    A cell is a row and a seed. Start the same command in as many processes as there is room for: each takes the next
    cell that nobody has. A process that dies is noticed after about 40 seconds; its cell goes on from its checkpoint.
    What is set for all rows goes with a name of its own.
    """
    with failures(out):
        from pipelines.cells import run_cells

        done = run_cells(specs, out, seeds or [0], row, settings or [], name, retry)
    raise typer.Exit(int(not done))


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="The study's folder, or a results.json.", show_default=False)],
    to: Annotated[Path, typer.Option(help="Folder for results.md, results.json and the pictures.")] = Path("docs"),
) -> None:
    """Write the tables and the pictures from a study's records."""
    with failures(to):
        from pipelines.results import write_results

        write_results(out, to)


if __name__ == "__main__":
    app()
