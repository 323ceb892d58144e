"""Draw one layer of a spec's model before and after the rewrite."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.console import Settings, Transforms, Without, failures, overrides

if TYPE_CHECKING:
    from rewriter import Session
    from rewriter.report.picture import Picture


class Form(StrEnum):
    """How the picture is written."""

    svg = "svg"
    dot = "dot"
    mermaid = "mermaid"


def show(
    spec: Annotated[Path, typer.Argument(help="The spec (YAML).", show_default=False)],
    settings: Settings = None,
    without: Without = None,
    transforms: Transforms = None,
    layer: Annotated[int, typer.Option(min=0, help="Which layer.")] = 0,
    format: Annotated[Form, typer.Option(help="svg for a viewer; dot or mermaid for other tools.")] = Form.svg,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; by default <spec>.layer<N>.<format> in the current folder.")
    ] = None,
) -> None:
    """Draw a layer's graph before and after the rewrite: inserted nodes by their class, frozen ones grey.

    No weight is read. Ops that only change a view are left out.
    """
    file = out or Path(f"{spec.name.partition('#')[0].removesuffix('.yaml')}.layer{layer}.{format}")
    with failures(file):
        from rewriter import Session, SubspanError
        from rewriter.files import write_text

        try:
            from rewriter.report.picture import WRITERS
        except ModuleNotFoundError as error:
            raise SubspanError(f"pictures need {error.name}: pip install 'subspan[pictures]'") from None
        write_text(file, WRITERS[format.value](pictures(Session(spec, *overrides(settings, without)), layer)))
        print(file)


def pictures(session: "Session", layer: int) -> "list[Picture]":
    """A layer's graph before and after the rewrite.

    Raises:
        SubspanError: there is no such layer, or the spec does not fit its model.
    """
    from rewriter.report.picture import layer_of, picture

    plan, (traced, _) = session.plan(whole=True), session.shapes(whole=True)
    module = layer_of(traced.graphs["eval"], plan, layer)
    return [
        picture(traced, plan, module, f"{module}: frozen"),
        picture(session.rewritten(), plan, module, f"{module}: rewritten"),
    ]


if __name__ == "__main__":
    typer.run(show)
