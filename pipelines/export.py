"""Ship a tuned run: adapter -> merge -> checkpoint + ONNX -> verify -> report."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipelines.console import Transforms, console, failures


class Target(StrEnum):
    """What files are for."""

    cpu = "cpu"
    cuda = "cuda"


class Adapter(StrEnum):
    """As what the adapter alone is written."""

    peft = "peft"
    low_rank = "lora"


As = Annotated[
    Adapter | None,
    typer.Option(
        help="Write the adapter alone, for PEFT and what reads its folders: as it is into RUN/peft, or any method's "
        "change as low-rank terms into RUN/peft-lora.",
        show_default=False,
    ),
]
Rank = Annotated[int | None, typer.Option(min=1, help="Of low-rank terms: the largest rank.", show_default=False)]
Error = Annotated[
    float,
    typer.Option(min=0, max=1, help="Of low-rank terms without --rank: what may be left over where it is not exact."),
]
Swappable = Annotated[
    bool,
    typer.Option(
        "--swappable",
        help="Write the base as one ONNX file whose adapters change at run time, and this run's adapter, into "
        "RUN/swappable.",
    ),
]
Beside = Annotated[
    list[Path] | None,
    typer.Option(help="With --swappable: a further run on the same base; any number of times.", show_default=False),
]


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    target: Annotated[Target, typer.Option(help="What the ONNX files are for.")] = Target.cpu,
    measure: Annotated[
        bool,
        typer.Option(help="Make and time variants, and ship the fastest that holds; else float32, or the first named."),
    ] = True,
    adapter: As = None,
    rank: Rank = None,
    error: Error = 0.01,
    swappable: Swappable = False,
    beside: Beside = None,
    transforms: Transforms = None,
) -> None:
    """Merge a run's adapter, write merged/ and onnx/, and compare every stage's outputs with the tuned model's.

    A difference over export.verify.atol is an error, and then nothing is written. What can't merge (prefixes, prompts,
    adapters with a nonlinearity) stays in the ONNX graph, and there is no merged/ then. Of the ONNX files that can be
    made of the model, the fastest that decides as the tuned run did becomes onnx/model.onnx; export.json lists all.
    """
    with failures(run):
        from rewriter import Session, print_summary
        from rewriter.adapters.store import check_transforms
        from rewriter.exchange import export_adapter, export_swappable
        from rewriter.folder import spec_of
        from rewriter.report.table import converted, shipped
        from rewriter.report.variants import print_variants

        if (run / "adapter").is_dir():
            check_transforms(run / "adapter")
        session = Session(spec_of(run))
        _check(adapter, rank, swappable, beside)
        if swappable:
            with console.status(f"writing and comparing {run}"):
                report = export_swappable(run, beside or ())
            facts = {name: f"{gap:.2e} from its run" for name, gap in report["adapters"].items()}
            facts |= {"without one": f"{report['base']:.2e} from the base"} if "base" in report else {}
            print_summary(f"exported {run}", facts | {"folder": report["folder"]}, console)
            return
        if adapter is not None:
            with console.status(f"writing and comparing {run}"):
                report = export_adapter(run, adapter is Adapter.low_rank, rank, error)
            print_summary(f"exported {run}", converted(report), console)
            return
        with console.status(f"merging, exporting and comparing {run}"):
            report = session.export(run, str(target), measure)
        print_summary(f"exported {run}", shipped(session.spec, run, report), console)
        if session.spec.export.onnx:
            print_variants(run, console)


def _check(adapter: Adapter | None, rank: int | None, swappable: bool, beside: list[Path] | None) -> None:
    """Refuse options that would do nothing.

    Raises:
        SubspanError: naming one.
    """
    from rewriter import SubspanError

    if swappable and adapter is not None:
        raise SubspanError("--swappable and --adapter write different things: give one of them")
    if beside and not swappable:
        raise SubspanError("--beside is of --swappable")
    if rank is not None and adapter is not Adapter.low_rank:
        raise SubspanError("--rank is of low-rank terms: --adapter " + Adapter.low_rank)


if __name__ == "__main__":
    typer.run(export)
