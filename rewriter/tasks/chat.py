"""Chats: the tokens of turns as a template renders them, and which of them are learnt."""

import contextlib
import itertools
import json
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import SpecError, reason

ASSISTANT, COMPLETION, ALL = "assistant", "completion", "all"
_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEMPLATE = ("data", "template")
_SAID = "\u2402said\u2403"
_MARKS, _COMMENTS = re.compile(r"\{%-?\s*generation\s*-?%\}"), re.compile(r"\{#.*?#\}", re.DOTALL)
Turn = dict[str, Any]


def turns_of(cell: Any, names: Mapping[str, str], roles: Mapping[str, str]) -> list[Turn]:
    """The turns that a cell holds, in the words of templates; what a turn has as null is left out.

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
            elif name in turn:
                raise ValueError(f"turn {number} has {name!r} and no {called!r}, as data.turns calls it")
        role = turn.get("role")
        if role is None:
            raise ValueError(f"turn {number} has no role, but {', '.join(turn)}: data.turns says what they are called")
        role = roles.get(role, role) if isinstance(role, str) else role
        if not isinstance(role, str) or role not in _ROLES:
            said = f"turn {number} has the role {role!r}, not one of {', '.join(_ROLES)}"
            raise ValueError(f"{said}; data.turns.roles says which of them it stands for")
        if "content" not in turn and "tool_calls" not in turn:
            raise ValueError(f"turn {number} has no content, or null")
        turns.append(turn | {"role": role} | ({"content": _text(turn["content"], number)} if "content" in turn else {}))
    return turns


def _text(content: Any, number: int) -> str:
    """A turn's text, which may be written as the only part of its content."""
    if isinstance(content, list):
        if len(content) != 1:
            raise ValueError(f"turn {number} has its content in {len(content)} parts: write it as one text")
        part = content[0] if isinstance(content[0], Mapping) else {}
        content = part.get("text") if part.get("type", "text") == "text" else content
    if not isinstance(content, str):
        raise ValueError(f"turn {number} has the content {repr(content)[:40]}, no text")
    return content


def disorder(turns: Sequence[Turn]) -> str | None:
    """What is odd in a chat: who speaks where nobody would, or an assistant who says nothing; None where nothing is."""
    before = "nobody"
    for turn in turns:
        role = turn["role"]
        given = before in ("nobody", "system", "developer")
        odd = {
            "system": not given,
            "developer": not given,
            "assistant": given or before == role,
            "user": before == role,
        }
        if odd.get(role, before not in ("assistant", "tool")):
            return f"{role} after {before}"
        if role == "assistant" and not turn.get("content", "").strip() and not turn.get("tool_calls"):
            return "an assistant's turn without text"
        before = role
    return None


def check_turns(
    cells: Iterable[Any], column: str, role: str, names: Mapping[str, str], roles: Mapping[str, str]
) -> None:
    """Every cell of a column holds turns.

    Args:
        names, roles: as of `turns_of`.

    Raises:
        SpecError: at the column, with the first row that has none.
    """
    for row, cell in enumerate(cells):
        with at_row(row, column, role):
            turns_of(cell, names, roles)


@contextlib.contextmanager
def at_row(row: int, column: str, role: str) -> Iterator[None]:
    """What is wrong with a cell (ValueError), as a SpecError at the column."""
    try:
        yield
    except ValueError as error:
        raise SpecError(f"row {row} of column {column!r}: {reason(error)}", ("data", "columns", role)) from None


def objects_of(cell: Any) -> list[dict[str, Any]]:
    """The objects of a list, or of a list as JSON, of null none. Left out is what is null: in a table, which fills in
    nulls, at any depth, and in JSON as a value of an object itself.

    Raises:
        ValueError: it holds anything else.
    """
    found = _parsed(cell) if isinstance(cell, str) else cell
    if not isinstance(found or [], list) or not all(isinstance(one, Mapping) for one in found or []):
        raise ValueError("no list of objects")
    if isinstance(cell, str):
        return [{key: value for key, value in one.items() if value is not None} for one in found or []]
    return [_bare(one) for one in found or []]


def _parsed(cell: str) -> Any:
    try:
        found = json.loads(cell)
    except ValueError as error:
        raise ValueError(f"no list as JSON: {reason(error)}") from None
    if "\\ud" in cell.lower():
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"it holds {half!a}, half of a character, which is no text") from None
    return found


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
    known: set[Hashable] | None = None,
) -> tuple[list[int], list[bool]]:
    """Token ids of a chat, and which of them are learnt.

    Args:
        processor: the tokenizer.
        turns: from `turns_of`.
        learn: `assistant`: the turns of the assistant, with what ends them; `all`: every token.
        tools: that the template tells of.
        known: forms of chats whose marks were checked; gets this one's.

    Raises:
        SpecError: there is no template, it can't render the turns or leaves one of them or a tool out, or what it
            renders of the first of them is no start of what it renders of all, so that which tokens are whose is not
            known; or its marks are not the assistant's turns.
    """
    turns, tools = list(turns), list(tools) if tools else None
    if processor.chat_template is None:
        raise SpecError("its tokenizer has no chat template; set data.template", ("model", "name"))
    text = _applied(processor, turns, tools, tokenize=False)
    _check_all_there(processor, turns, tools, text)
    if learn == ASSISTANT and _MARKS.search(_COMMENTS.sub("", processor.get_chat_template(tools=tools))):
        options = {"return_dict": True, "return_assistant_tokens_mask": True, "tokenizer_kwargs": {"verbose": False}}
        made = _applied(processor, turns, tools, tokenize=True, **options)
        ids, learnt = list(made["input_ids"]), [bool(one) for one in made["assistant_masks"]]
        form = tuple((turn["role"], bool(turn.get("content")), len(turn.get("tool_calls") or [])) for turn in turns)
        if known is None or form not in known:
            _check_marks(processor, turns, tools, text, learnt)
        if known is not None:
            known.add(form)
    else:
        made = placed(processor, text, add_special_tokens=False, verbose=False)
        ids = list(made["input_ids"])
        spans = [(0, len(text))] if learn == ALL else _spans(processor, turns, tools, text)
        # What a turn shares with what is before it is the turn's.
        inside = lambda first, last: any(start < max(last, first + 1) and first < stop for start, stop in spans)  # noqa: E731
        learnt = [inside(first, last) for first, last in made["offset_mapping"]]
    return ids, learnt


def _check_all_there(processor: Any, turns: list[Turn], tools: list[Any] | None, text: str) -> None:
    """Every turn, every call with its arguments, and the tools are in what is rendered, as they are written or in a way
    that other words would change."""

    def rendered_alike(others: list[Turn], told: list[Any] | None) -> bool:
        try:
            return _applied(processor, others, told, tokenize=False) == text
        except SpecError:  # It reads what is other.
            return False

    contents = [said.strip() if isinstance(said := turn.get("content"), str) else "" for turn in turns]
    around = json.dumps([processor.get_chat_template(tools=tools), tools, [turn.get("tool_calls") for turn in turns]])
    for i, (turn, said) in enumerate(zip(turns, contents, strict=True)):
        alone = said in text and said not in around and not any(said in one for k, one in enumerate(contents) if k != i)
        if said and not alone and rendered_alike(_with(turns, i, content=turn["content"] + _SAID), tools):
            raise _left_out(f"turn {i}, the {turn['role']}'s")
        for k, call in enumerate(turn.get("tool_calls") or []):
            if rendered_alike(_with_call(turns, i, k, _other(call)), tools):
                raise _left_out(f"a call in turn {i}, or what it is called with")
    if tools and rendered_alike(turns, [_other(tool) for tool in tools]):
        raise _left_out("the tools")


def _check_marks(processor: Any, turns: list[Turn], tools: list[Any] | None, text: str, learnt: list[bool]) -> None:
    """What a template marks as learnt is the assistant's: where each turn's text and calls begin."""
    offsets = placed(processor, text, add_special_tokens=False, verbose=False)["offset_mapping"]
    marked = [place for place, one in zip(offsets, learnt, strict=True) if one]
    for i, turn in enumerate(turns):
        begins = [_begins(processor, turns, tools, text, i)] if turn.get("content", "").strip() else []
        for k, call in enumerate(turn.get("tool_calls") or []):
            with contextlib.suppress(SpecError):  # It reads what is other.
                rendered = _applied(processor, _with_call(turns, i, k, _other(call)), tools, tokenize=False)
                begins.append(_shared(text, rendered))
        for begin in begins:
            own = any(first <= begin < stop for first, stop in marked)
            if own and turn["role"] != "assistant":
                said = f"marks turn {i}, the {turn['role']}'s, as the assistant's"
                raise SpecError(f"its chat template {said} by {{% generation %}}", _TEMPLATE)
            if turn["role"] == "assistant" and not own and begin < len(text):
                said = f"marks nothing, or not all, of turn {i}, the assistant's"
                raise SpecError(f"its chat template {said}, by {{% generation %}}", _TEMPLATE)


def _with(turns: list[Turn], i: int, **values: Any) -> list[Turn]:
    return [*turns[:i], turns[i] | values, *turns[i + 1 :]]


def _with_call(turns: list[Turn], i: int, k: int, call: Any) -> list[Turn]:
    calls = turns[i]["tool_calls"]
    return _with(turns, i, tool_calls=[*calls[:k], call, *calls[k + 1 :]])


def _other(one: Any) -> Any:
    """A call with other arguments, where it has any; a call or a tool of another name."""
    if isinstance(one, Mapping) and isinstance(one.get("function"), Mapping):
        return {**one, "function": _other(one["function"])}
    if isinstance(one, Mapping) and one.get("arguments"):
        given = one["arguments"]
        return {**one, "arguments": {**given, _SAID: _SAID} if isinstance(given, Mapping) else f"{given}{_SAID}"}
    if isinstance(one, Mapping) and isinstance(one.get("name"), str):
        return {**one, "name": one["name"] + _SAID}
    return _SAID


def _spans(processor: Any, turns: list[Turn], tools: Any, whole: str) -> list[tuple[int, int]]:
    """Where the assistant's turns are in a rendered chat: each from what is given when the model is asked for it, or
    else from its text, to what ends a turn."""
    spans = []
    for i in (i for i, turn in enumerate(turns) if turn["role"] == "assistant"):
        given = _applied(processor, turns[:i], tools, tokenize=False, add_generation_prompt=True) if i else ""
        start = len(given) if given and whole.startswith(given) else _begins(processor, turns, tools, whole, i)
        stop = _ends(processor, turns, tools, whole, i, start)
        if stop is None or stop < start or (stop == start and turns[i].get("content")):
            raise SpecError(
                f"what the template renders of the first {i + 1} turns is no start of what it renders of all "
                f"{len(turns)}: which tokens are the assistant's is not known; mark them in data.template by "
                "{% generation %}, or set data.loss: all",
                ("data", "loss"),
            )
        spans.append((start, stop))
    return spans


def _begins(processor: Any, turns: list[Turn], tools: Any, whole: str, i: int) -> int:
    """Where the text of a turn begins: up to there it is rendered alike with another text."""
    return _shared(whole, _applied(processor, _with(turns, i, content=_SAID), tools, tokenize=False))


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _ends(processor: Any, turns: list[Turn], tools: Any, whole: str, i: int, start: int) -> int | None:
    """Where a turn ends, with what ends it; None where that is not known."""
    if i + 1 == len(turns):
        return len(whole)
    after = _applied(processor, turns[: i + 1], tools, tokenize=False)
    for part in (after, after.rstrip().removesuffix(processor.eos_token or "")):  # Some end the whole chat with it.
        if part and whole.startswith(part):
            return len(part)
    # Some templates write a last turn in another way.
    last = [*turns[:i], {"role": "assistant", "content": _SAID}]
    end = _applied(processor, last, tools, tokenize=False).rpartition(_SAID)[2]
    said, following = turns[i].get("content"), _begins(processor, turns, tools, whole, i + 1)
    own = whole.find(said.strip(), start, following) if isinstance(said, str) else -1
    place = whole.find(end, own + len(said.strip()) if own >= 0 else start) if end.strip() else -1
    return place + len(end) if place >= 0 and place + len(end) <= following else None


def _left_out(what: str) -> SpecError:
    said = f"its chat template leaves out {what}: set data.template to one that has it, or take it out of the data"
    return SpecError(said, _TEMPLATE)


def placed(processor: Any, text: str | Sequence[str], **options: Any) -> Any:
    """Token ids with `offset_mapping`, where in the text each stands.

    Raises:
        SpecError: the tokenizer doesn't know.
    """
    if not processor.is_fast:
        said = f"{type(processor).__name__} doesn't say where its tokens stand in a text: a fast tokenizer is needed"
        raise SpecError(said, ("model", "name"))
    return processor(text, return_offsets_mapping=True, **options)


def asked(processor: Any, turns: Sequence[Turn], tools: Sequence[Any] | None) -> list[int]:
    """The tokens of turns where the assistant is to answer.

    Raises:
        SpecError: the template can't render them.
    """
    text = _applied(processor, list(turns), tools or None, tokenize=False, add_generation_prompt=True)
    return processor(text, add_special_tokens=False, verbose=False)["input_ids"]


def unprompted(processor: Any, turns: Sequence[Turn], tools: Sequence[Any] | None = None) -> str | None:
    """What a template that adds nothing where the model is asked writes before the assistant's first text all the same;
    None where that is nothing."""
    texts = ((i, turn.get("content", "").strip()) for i, turn in enumerate(turns) if turn["role"] == "assistant")
    i, said = next(texts, (0, ""))
    before, tools = list(turns[:i]), list(tools) if tools else None
    if not before or not said:
        return None
    try:
        given = _applied(processor, before, tools, tokenize=False)
        asking = _applied(processor, before, tools, tokenize=False, add_generation_prompt=True)
        whole = _applied(processor, [*before, turns[i]], tools, tokenize=False)
    except SpecError:  # It wants other turns before.
        return None
    if given != asking or not whole.startswith(given):
        return None
    start = whole[len(given) :].partition(said)[0]
    return start if start.strip() else None


def turn_ends(processor: Any) -> list[int]:
    """The last special token of an assistant's turn, if it has one."""
    turns = [{"role": "user", "content": _SAID}, {"role": "assistant", "content": _SAID}]
    try:
        end = _applied(processor, turns, None, tokenize=False).rpartition(_SAID)[2]
    except SpecError:  # It wants other turns.
        return []
    special = set(processor.all_special_ids) | set(processor.added_tokens_decoder)
    found = [one for one in processor(end, add_special_tokens=False)["input_ids"] if one in special]
    return found[-1:]


def clocked(processor: Any) -> bool:
    """Whether what a chat template renders depends on when it does."""
    return "strftime_now" in str(getattr(processor, "chat_template", None))


def _applied(processor: Any, turns: list[Turn], tools: Any, **options: Any) -> Any:
    try:
        return processor.apply_chat_template(turns, tools=tools, **options)
    except Exception as error:  # Of a template: it raises its own.
        raise SpecError(f"its chat template can't render the turns: {reason(error)}", _TEMPLATE) from None
