"""A talk with a run in the terminal: a line a turn, its answer as it is written."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rewriter.answer import answerer, rows_of
from rewriter.errors import SubspanError
from rewriter.spec import Spec

HELP = "a line is a turn; /reset forgets all before, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def chat(spec: Spec, run: Path, stage: str, tokens: int, system: str | None = None) -> None:
    """Answer lines of stdin until it ends or one says /exit.

    Of data that has chats every line is the user's turn, and an answer is the assistant's: all turns are rendered each
    time. Of other data each line stands by itself. A line that can't be answered is said on stderr, and forgotten.

    Args:
        stage, tokens: as of `rewriter.answer.answerer`.
        system: what a first turn of the system says.

    Raises:
        SubspanError: the run's task does not write, there is no such stage, or a system turn but no chats.
    """
    if not spec.task.writes:
        raise SubspanError(f"{spec.task.name} writes no text: ask it without --chat")
    asked = spec.task.asks_of(spec.columns)[0]
    turned = spec.task.kind(asked, spec.columns) == "messages"
    if system is not None and not turned:
        raise SubspanError("--system is for runs whose data has chats")
    answer = answerer(spec, run, stage, tokens)
    first = [] if system is None else [{"role": "system", "content": system}]
    if sys.stdin.isatty():
        print(HELP, file=sys.stderr)
    turns = list(first)
    for line in _lines():
        if line.strip() == "/reset":
            turns = list(first)
            continue
        now = [*turns, {"role": "user", "content": line}]
        said = _said(answer, (lambda now=now: {asked: now}) if turned else (lambda line=line: rows_of(spec, [line])[0]))
        if said is not None and turned:
            turns = [*now, {"role": "assistant", "content": said}]


def _lines() -> Iterator[str]:
    """What is said, up to /exit; lines with nothing on them are left out."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:  # There is no answer to stop: the line is dropped.
            print(flush=True)
            continue
        if line.strip() == "/exit":
            return
        if line.strip():
            yield line


def _said(answer: Callable[..., dict[str, Any]], row: Callable[[], dict[str, Any]]) -> str | None:
    """The answer to a row, printed as it comes; of one that is stopped what there was. None where there is none."""
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        print(text, end="", flush=True)

    try:
        answer(row(), tell)
    except KeyboardInterrupt:
        pass
    except SubspanError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return None
    print(flush=True)
    return "".join(told)
