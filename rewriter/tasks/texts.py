"""Texts, completions and chats as token ids, with which of them are learnt; the end of each among them."""

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import SpecError
from .base import IGNORED, Reading
from .cells import words
from .chat import ALL, ASSISTANT, Turn, at_row, objects_of, placed, tokens_of, turn_ends, turns_of

Learnt = tuple[list[int], list[bool]]


def _twice(ids: Sequence[int], processor: Any) -> int:
    """1 where a text that starts with the start token got another one before it, else 0."""
    return int(processor.bos_token_id is not None and list(ids[:2]) == [processor.bos_token_id] * 2)


def opening(text: Any, processor: Any, completed: bool) -> list[int]:
    """The token ids that a text goes on from.

    Args:
        completed: it is a prompt: an end token that the tokenizer puts after it is none of it.
    """
    ids = processor(str(text))["input_ids"]
    ids = ids[_twice(ids, processor) :]
    return ids[:-1] if completed and ids[-1:] == [processor.eos_token_id] else ids


def endings(processor: Any, turned: bool) -> list[int]:
    """What ends a turn of the assistant, where texts are turns and it is a special token; else the end token."""
    found = turn_ends(processor) if turned else []
    return found or [token for token in (processor.eos_token_id,) if token is not None]


def labelled(ids: Sequence[int], learnt: Sequence[bool]) -> list[int]:
    """Of each token the next one where that is learnt; the last has none."""
    return [one if kept else IGNORED for one, kept in zip(ids[1:], learnt[1:], strict=True)] + [IGNORED]


def _ended(ids: list[int], learnt: list[bool], end: int | None) -> Learnt:
    """With the end token, learnt, once, where a text has any token."""
    if end is None or not ids:
        return ids, learnt
    if ids[-2:] == [end, end]:  # The text's own, and the tokenizer's.
        ids, learnt = ids[:-1], learnt[:-1]
    return ([*ids[:-1], end], [*learnt[:-1], True]) if ids[-1] == end else ([*ids, end], [*learnt, True])


def texts(cells: Sequence[Any], reading: Reading) -> list[Learnt]:
    """A text that is empty has no tokens, whatever the tokenizer puts around it."""
    processor, given = reading.processor, words(cells)
    made = processor(given, verbose=False)["input_ids"]
    kept = [ids[_twice(ids, processor) :] if text else [] for ids, text in zip(made, given, strict=True)]
    return [_ended(ids, [True] * len(ids), processor.eos_token_id) for ids in kept]


def completions(prompts: Sequence[Any], cells: Sequence[Any], reading: Reading) -> list[Learnt]:
    """Prompts with what completes them, of which alone the tokens are learnt unless the reading says all."""
    prompts, found = words(prompts), []
    whole = [one + completion for one, completion in zip(prompts, words(cells), strict=True)]
    made = placed(reading.processor, whole, verbose=False, return_special_tokens_mask=True)
    parts = (made[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
    for ids, places, special, asking in zip(*parts, prompts, strict=True):
        # What the two share is the completion's.
        learnt = [
            reading.loss == ALL or (stop > len(asking) and not added)
            for (_, stop), added in zip(places, special, strict=True)
        ]
        start = _twice(ids, reading.processor)
        found.append(_ended(ids[start:], learnt[start:], reading.processor.eos_token_id))
    return found


def turns_in(cells: Sequence[Any], index: Sequence[int], role: str, reading: Reading) -> list[list[Turn]]:
    """The turns in a role's cells.

    Args:
        index: numbers of the rows.

    Raises:
        SpecError: at the role's column, with the row that has none.
    """
    return _each(cells, index, role, reading, lambda cell: turns_of(cell, reading.turns, reading.spoken))


def tools_in(cells: Sequence[Any], index: Sequence[int], reading: Reading) -> list[list[Any]]:
    """The tools in cells, as `turns_in`."""
    return _each(cells, index, "tools", reading, objects_of)


def _each(
    cells: Sequence[Any], index: Sequence[int], role: str, reading: Reading, read: Callable[[Any], Any]
) -> list[Any]:
    found = []
    for number, cell in zip(index, cells, strict=True):
        with at_row(number if reading.numbers is None else reading.numbers[number], reading.columns[role], role):
            found.append(read(cell))
    return found


def chats(
    given: Sequence[list[Turn]], index: Sequence[int], reading: Reading, tools: Sequence[list[Any]] | None = None
) -> list[Learnt]:
    """Chats by the tokenizer's template.

    Args:
        index: numbers of the rows.
        tools: that each row has.

    Raises:
        SpecError: as `tokens_of`, with the row.
    """
    found, ended, known = [], None, set()
    for place, (number, turns) in enumerate(zip(index, given, strict=True)):
        try:
            own = tools[place] if tools is not None else None
            ids, learnt = tokens_of(reading.processor, turns, reading.loss or ASSISTANT, own, known)
            ended = turn_ends(reading.processor) if ended is None else ended
        except SpecError as error:
            start = f"a chat that starts with {str(turns[0].get('content'))[:40]!r}"
            raise SpecError(f"{error.message} ({start}){reading.named([number])}", error.path) from None
        last = turns[-1]["role"] == "assistant" and not ended
        found.append(_ended(ids, learnt, reading.processor.eos_token_id) if last else (ids, learnt))
    return found
