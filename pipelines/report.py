"""Write a run's page."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.console import Transforms, console, failures
from pipelines.show import pictures

if TYPE_CHECKING:
    from rewriter import Spec

_AGAIN = 5  # seconds


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.", show_default=False)],
    transforms: Transforms = None,
    layer: Annotated[int, typer.Option(min=0, help="Which layer's graph is drawn.")] = 0,
) -> None:
    """Write RUN/report.html: one page that needs nothing else, with all that is in the run's folder.

    Curves, plan, a layer's graph before and after the rewrite, the subspaces that the tuned weights span beside the
    frozen ones, what was compared, and the files with size and latency. While a command works in the folder the page is
    written anew every few seconds, and loads itself anew; Ctrl-C ends that.
    """
    with failures(run):
        from rewriter import SubspanError
        from rewriter.files import write_text
        from rewriter.folder import PAGE, busy, spec_of

        try:
            from rewriter.report.page import page
        except ModuleNotFoundError as error:
            raise SubspanError(f"pages need {error.name}: pip install 'subspan[pictures]'") from None
        spec = spec_of(run)
        with console.status(f"following {run}") as status:
            while busy(run):
                write_text(run / PAGE, page(spec, run, running=True))
                time.sleep(_AGAIN)
            status.update("looking at the tuned weights")
            drawing, why = _drawn(spec, layer)
            spanned, reason = _spanned(spec, run)
            write_text(run / PAGE, page(spec, run, False, drawing, spanned, {"drawing": why, "spanned": reason}))
        print(run / PAGE)


def _drawn(spec: "Spec", layer: int) -> tuple[str, str]:
    """A layer's graph before and after the rewrite, SVG; or why there is none."""
    from rewriter import Session, SubspanError

    try:
        from rewriter.report.picture import to_svg
    except ModuleNotFoundError as error:
        return "", f"not drawn: it needs {error.name}: pip install 'subspan[pictures]'"
    try:
        return to_svg(pictures(Session(spec), layer)), ""
    except SubspanError as error:
        return "", f"not drawn: {str(error).splitlines()[0]}"


def _spanned(spec: "Spec", run: Path) -> tuple[list, str]:
    """What every tuned weight spans; or why that is not known."""
    from rewriter import SubspanError
    from rewriter.export.ship import load_tuned
    from rewriter.report.subspaces import subspaces

    if not (run / "adapter").is_dir():
        return [], "There is no adapter yet."
    try:
        *_, tuned = load_tuned(spec, run)
        found = list(subspaces(tuned))
        return found, "" if found else "No matrix of the base is tuned that merges."
    except SubspanError as error:
        return [], f"not known: {str(error).splitlines()[0]}"


if __name__ == "__main__":
    typer.run(report)
