"""Make a run of several runs' changes of one base, added with weights."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from pipelines.console import Transforms, console, failures

How = Literal["linear", "ties", "dare_linear", "dare_ties"]


def combine(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs on one base; their methods may differ.")],
    weight: Annotated[
        list[float],
        typer.Option(help="Of a run, in their order; or one for all. A negative one takes away.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; made new.", show_default=False)],
    how: Annotated[How, typer.Option(help="The weighted sum, or TIES, or DARE before either of them.")] = "linear",
    density: Annotated[
        float | None,
        typer.Option(help="Share of a run's entries that TIES (the largest) or DARE (any) keeps.", show_default=False),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="The result as low-rank terms (LoRA) of at most this rank.", show_default=False),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="The same, of the rank that leaves this much of a change.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of what DARE keeps.")] = 0,
    transforms: Transforms = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="First delete the run that is in --out.")] = False,
) -> None:
    """Add what runs changed in the weights of one base, exactly, and make a run of it.

    Each run's metric is taken alone and with the result's weights under its own head. Newly made heads, task, labels
    and data of the result are the first run's. Without --rank and --error every entry of the changed weights is in its
    adapter. Export, run and load_adapter take the result; combine.json in it has the table.
    """
    with failures(out):
        from rewriter import print_summary
        from rewriter.exchange import combine_runs
        from rewriter.report.table import combined_table

        with console.status("combining") as status:
            report = combine_runs(
                runs, weight, out, how, density, rank, error, seed, overwrite, lambda said: status.update(escape(said))
            )
        heads, rows = combined_table(report)
        table = Table(*heads)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        facts = {"how": how if density is None else f"{how}, density {density:g}"}
        if terms := report.get("sites"):
            facts["largest rank"] = max(one["r"] for one in terms.values())
            facts["largest error"] = f"{max(one['error'] for one in terms.values()):.4f}"
        print_summary("combined", facts | {"adapter": out / "adapter"}, console)


if __name__ == "__main__":
    typer.run(combine)
