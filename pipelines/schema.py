"""Write what follows from the spec's models: specs/spec.schema.json for editors, docs/methods.md for people."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.console import Transforms, failures


def schema(
    folder: Annotated[Path, typer.Argument(help="Where specs/ and docs/ are.")] = Path("."),
    transforms: Transforms = None,
) -> None:
    """Write specs/spec.schema.json, for editors, and docs/methods.md, with all transforms that are installed."""
    with failures(folder):
        from rewriter.files import write_text
        from rewriter.report.schema import pages

        for file, text in pages().items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            write_text(folder / file, text)


if __name__ == "__main__":
    typer.run(schema)
