"""Ship a tuned run: adapter -> merge -> checkpoint + ONNX -> verify -> report."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.console import Transforms, console, failures


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    transforms: Transforms = None,
) -> None:
    """Merge a run's adapter, write merged/ and onnx/, and compare every stage's outputs with the tuned model's.

    A difference over export.verify.atol is an error, and then nothing is written. What can't merge (prefixes, prompts,
    adapters with a nonlinearity) stays in the ONNX graph, and there is no merged/ then.
    """
    with failures(run):
        from rewriter import Session, print_summary
        from rewriter.adapters.store import check_transforms
        from rewriter.folder import spec_of
        from rewriter.report.table import shipped

        if (run / "adapter").is_dir():
            check_transforms(run / "adapter")
        session = Session(spec_of(run))
        report = session.export(run)
        print_summary(f"exported {run}", shipped(session.spec, run, report), console)


if __name__ == "__main__":
    typer.run(export)
