"""Chats: the tokens of turns as a template renders them, and which of them are learnt."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import SpecError, reason

ASSISTANT, COMPLETION, ALL = "assistant", "completion", "all"
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SAID = "\u2402said\u2403"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Turn = dict[str, Any]


def turns_of(cell: Any, names: Mapping[str, str], roles: Mapping[str, str]) -> list[Turn]:
    """The turns that a cell holds, in the words of templates; values that are null are left out.

    Args:
        cell: a list of objects, or that as JSON.
        names: what `role` and `content` are called in the cell.
        roles: what its roles are called -> what templates call them.

    Raises:
        ValueError: it holds no turns, saying why.
    """
    found, turns = objects_of(cell), []
    if not found:
        raise ValueError("no turns")
    for number, turn in enumerate(found):
        for name, called in names.items():
            if called in turn:
                turn[name] = turn.pop(called)
        role = roles.get(turn.get("role"), turn.get("role"))
        if role not in _ROLES:
            raise ValueError(f"turn {number} has the role {role!r}, not one of {', '.join(_ROLES)}")
        if "content" not in turn and "tool_calls" not in turn:
            raise ValueError(f"turn {number} has no content")
        turns.append(turn | {"role": role})
    return turns


def check_turns(cells: Iterable[Any], column: str, names: Mapping[str, str], roles: Mapping[str, str]) -> None:
    """Every cell of a column holds turns.

    Args:
        names, roles: as of `turns_of`.

    Raises:
        SpecError: at the column, with the first row that has none.
    """
    for row, cell in enumerate(cells):
        try:
            turns_of(cell, names, roles)
        except ValueError as error:
            said = f"row {row} of column {column!r}: {reason(error)}"
            raise SpecError(said, ("data", "columns", "messages")) from None


def objects_of(cell: Any) -> list[dict[str, Any]]:
    """The objects of a list, or of a list as JSON, without what is null in them; of null none.

    Raises:
        ValueError: it holds anything else.
    """
    cell = json.loads(cell) if isinstance(cell, str) else cell
    if not isinstance(cell or [], list) or not all(isinstance(one, Mapping) for one in cell or []):
        raise ValueError("no list of objects")
    return [_bare(one) for one in cell or []]


def _bare(value: Any) -> Any:
    """A value without the nulls that a table fills in where other rows have a key."""
    if isinstance(value, Mapping):
        return {key: _bare(one) for key, one in value.items() if one is not None}
    return [_bare(one) for one in value] if isinstance(value, list) else value


def tokens_of(
    processor: Any,
    turns: Sequence[Turn],
    learn: str,
    tools: Sequence[Any] | None = None,
) -> tuple[list[int], list[bool]]:
    """Token ids of a chat, and which of them are learnt.

    Args:
        processor: the tokenizer.
        turns: from `turns_of`.
        learn: `assistant`: the turns of the assistant, with what ends them; `all`: every token.
        tools: that the template tells of.

    Raises:
        SpecError: there is no template, it can't render the turns, or what it renders of the first of them is no start
            of what it renders of all, so that which tokens are whose is not known.
    """
    turns, tools = list(turns), list(tools) if tools else None
    if processor.chat_template is None:
        raise SpecError("its tokenizer has no chat template; set data.template", ("model", "name"))
    if learn == ASSISTANT and _MARKS.search(processor.get_chat_template(tools=tools)):
        made = _applied(processor, turns, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, learnt = list(made["input_ids"]), [bool(one) for one in made["assistant_masks"]]
    else:
        text = _applied(processor, turns, tools, tokenize=False)
        made = placed(processor, text, add_special_tokens=False)
        ids = list(made["input_ids"])
        spans = [(0, len(text))] if learn == ALL else _spans(processor, turns, tools, text)
        learnt = [any(start <= first < stop for start, stop in spans) for first, _ in made["offset_mapping"]]
    return ids, learnt


def _spans(processor: Any, turns: list[Turn], tools: Any, whole: str) -> list[tuple[int, int]]:
    """Where the assistant's turns are in a rendered chat: each from what is given when the model is asked for it, to
    what ends a turn."""
    spans = []
    for i in (i for i, turn in enumerate(turns) if turn["role"] == "assistant"):
        before = _applied(processor, turns[:i], tools, tokenize=False, add_generation_prompt=True)
        if not whole.startswith(before):
            before = _applied(processor, turns[:i], tools, tokenize=False)
        after = whole if i + 1 == len(turns) else _applied(processor, turns[: i + 1], tools, tokenize=False)
        stop = len(after)
        if not whole.startswith(after):  # Some templates write a last turn in another way.
            last = [*turns[:i], {"role": "assistant", "content": _SAID}]
            end = _applied(processor, last, tools, tokenize=False).rpartition(_SAID)[2]
            place = whole.find(end, len(before)) if end.strip() else -1
            stop = place + len(end) if place >= 0 else -1
        if not whole.startswith(before) or stop < 0:
            raise SpecError(
                f"what the template renders of the first {i} turns is no start of what it renders of all {len(turns)}: "
                "which tokens are the assistant's is not known; mark them in data.template by {% generation %}, or set "
                "data.loss: all",
                ("data", "loss"),
            )
        spans.append((len(before), stop))
    return spans


def placed(processor: Any, text: str | Sequence[str], **options: Any) -> Any:
    """Token ids with `offset_mapping`, where in the text each stands.

    Raises:
        SpecError: the tokenizer doesn't know.
    """
    if not processor.is_fast:
        said = f"{type(processor).__name__} doesn't say where its tokens stand in a text: a fast tokenizer is needed"
        raise SpecError(said, ("model", "name"))
    return processor(text, return_offsets_mapping=True, **options)


def turn_ends(processor: Any) -> list[int]:
    """The last special token of an assistant's turn, if it has one."""
    turns = [{"role": "user", "content": _SAID}, {"role": "assistant", "content": _SAID}]
    end = _applied(processor, turns, None, tokenize=False).rpartition(_SAID)[2]
    special = set(processor.all_special_ids) | set(processor.added_tokens_decoder)
    found = [one for one in processor(end, add_special_tokens=False)["input_ids"] if one in special]
    return found[-1:]


def _applied(processor: Any, turns: list[Turn], tools: Any, **options: Any) -> Any:
    if not turns and not tools:
        return ""
    try:
        return processor.apply_chat_template(turns, tools=tools, **options)
    except Exception as error:  # Of a template: it raises its own.
        raise SpecError(f"its chat template can't render the turns: {reason(error)}", ("data", "template")) from None
