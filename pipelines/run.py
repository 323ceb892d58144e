"""Ask a run: labels with scores, texts that go on, embeddings, spans, as lines of JSON."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.console import Transforms, failures


class Stage(StrEnum):
    """What answers."""

    onnx = "onnx"
    merged = "merged"
    tuned = "tuned"
    base = "base"


def run(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, exported or --with tuned.", show_default=False)
    ],
    texts: Annotated[list[str] | None, typer.Argument(help="What is asked, a row each.", show_default=False)] = None,
    file: Annotated[Path | None, typer.Option(help="A row a line, instead; `-`, or neither: stdin.")] = None,
    stages: Annotated[
        list[Stage] | None, typer.Option("--with", help="What answers, default onnx; given twice, both, side by side.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens that a text goes on by.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Talk: each line of stdin is a turn.")] = False,
    system: Annotated[str | None, typer.Option(help="Of chats: what the system says first.")] = None,
    transforms: Transforms = None,
) -> None:
    """Ask a run's shipped file, the merged checkpoint, the tuned model, or the base model without what was tuned.

    A row is a text, an image's path, or an object of JSON with what the task reads: {"question": ..., "context": ...},
    {"text": ..., "text_pair": ...}, {"messages": [...]}; of data with chats a text is the user's turn.

    Prints a line of JSON for each row and stage, in order; a line with nothing on it is an empty text.

    With --chat answers are printed as they are written, and of data with chats each is given with the next turn: /reset
    forgets all before, /exit or Ctrl-D ends, Ctrl-C stops an answer.
    """
    with failures(folder):
        from rewriter.answer import answerer, rows_of
        from rewriter.errors import SubspanError
        from rewriter.folder import spec_of

        spec = spec_of(folder)
        if chat:
            if texts or file or len(stages or []) > 1:
                raise SubspanError("--chat reads stdin, and one stage answers: no texts, no --file, one --with")
            from pipelines.chat import chat as talk

            return talk(spec, folder, str(stages[0] if stages else Stage.onnx), tokens, system)
        if texts and file:
            raise SubspanError("texts, or --file: not both")
        read = file.read_text() if file and str(file) != "-" else "" if texts else sys.stdin.read()
        lines = [line.removesuffix("\r") for line in read.removesuffix("\n").split("\n")] if read else []
        rows, notes = rows_of(spec, texts or lines), []
        rows = rows if system is None else _after(system, rows)
        if not rows:
            raise SubspanError("nothing is asked: give texts, --file, or lines on stdin")
        answers = {str(one): answerer(spec, folder, str(one), tokens, notes) for one in stages or [Stage.onnx]}
        for number, row in enumerate(rows, 1):
            for name, answer in answers.items():
                try:
                    found = answer(row)
                except SubspanError as error:
                    raise SubspanError(f"row {number}: {error}") from error
                said = {"with": name} | found if len(answers) > 1 else found
                print(json.dumps(said, ensure_ascii=False), flush=True)
            for note in dict.fromkeys(notes):
                print(f"row {number}: {note}", file=sys.stderr, flush=True)
            notes.clear()


def _after(system: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chats after what the system says."""
    from rewriter.errors import SubspanError

    if not all("messages" in row for row in rows):
        raise SubspanError("--system is for runs whose data has chats")
    if any(row["messages"][0]["role"] == "system" for row in rows):
        raise SubspanError("--system, and a row that begins with a system turn: not both")
    return [row | {"messages": [{"role": "system", "content": system}, *row["messages"]]} for row in rows]


if __name__ == "__main__":
    typer.run(run)
