"""Ask a run: labels with scores, texts that go on, embeddings, spans, as lines of JSON."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipelines.console import Transforms, failures


class Stage(StrEnum):
    """What answers."""

    onnx = "onnx"
    merged = "merged"
    tuned = "tuned"


def run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of an exported run.", show_default=False)],
    texts: Annotated[list[str] | None, typer.Argument(help="What is asked, a row each.", show_default=False)] = None,
    file: Annotated[Path | None, typer.Option(help="A row a line, instead; without texts, stdin is read.")] = None,
    stages: Annotated[
        list[Stage] | None, typer.Option("--with", help="What answers, default onnx; given twice, both, side by side.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens that a text goes on by.")] = 64,
    transforms: Transforms = None,
) -> None:
    """Ask a run's shipped file, the merged checkpoint, or the tuned model. A row is a text, an image's path, or an
    object of JSON with what the task reads: {"question": ..., "context": ...}, {"text": ..., "text_pair": ...}.

    Prints a line of JSON for each row and stage.
    """
    with failures(folder):
        from rewriter.answer import answerer, rows_of
        from rewriter.folder import spec_of

        spec = spec_of(folder)
        lines = texts or (file.read_text().splitlines() if file else sys.stdin.read().splitlines())
        rows = rows_of(spec, [line for line in lines if line.strip()])
        answers = {str(one): answerer(spec, folder, str(one), tokens) for one in stages or [Stage.onnx]}
        for row in rows:
            for name, answer in answers.items():
                found = answer(row)
                said = {"with": name} | found if len(answers) > 1 else found
                print(json.dumps(said, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    typer.run(run)
