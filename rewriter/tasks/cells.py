"""Cells of columns: what a role reads, and which cells are none of that."""

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import SpecError

_SHOWN = 40
_GENERIC = "LABEL_"
_LABEL = ("data", "columns", "label")
_WHOLE = re.compile(r"\s*(0|[1-9]\d{0,8})(?:\.0+)?\s*")
_LARGEST = 1e18  # Its square is a float32 still.


def words(values: Sequence[Any]) -> list[str]:
    """Cells as texts; an empty cell is an empty text."""
    return ["" if value is None else str(value) for value in values]


def class_reader(feature: Any, labels: Sequence[str]) -> Callable[[Any], int]:
    """A function from a label as written to its class index: a class name, or else an index into the names. A column
    that mixes both is refused before (`check_readings`). A truth value is the name `true` or `false`, and no index.

    Args:
        feature: of `datasets`, of the column; a ClassLabel's own names stand for its numbers.
    """
    index = {label: i for i, label in enumerate(labels)}
    names = _own_names(feature)
    names = names if names and set(names) <= set(labels) else None
    truths = {label.lower(): i for i, label in enumerate(labels)}
    numbers = _numbers(labels)

    def read(value: Any) -> int:
        if isinstance(value, bool) and set(truths) == {"true", "false"}:
            return truths[str(value).lower()]
        if value is None or isinstance(value, bool):
            raise ValueError(value)
        if names and isinstance(value, int):
            value = names[value]
        if str(value) in index:
            return index[str(value)]
        place = _whole(value)
        if place in numbers:
            return numbers[place]
        if place is not None and 0 <= place < len(labels):
            return place
        raise ValueError(value)

    return read


def _numbers(labels: Sequence[str]) -> dict[int | None, int]:
    """The whole numbers that labels are called, 01 and 1.0 among them -> index."""
    found: dict[int | None, int] = {}
    for i, label in enumerate(labels):
        with contextlib.suppress(ValueError, OverflowError):
            if number(label) % 1 == 0:
                found[int(float(label))] = i
    return found


def _whole(value: Any) -> int | None:
    """The whole number that a cell is, or that its text is as anyone writes it: 1, or 1.0, but not 01."""
    if isinstance(value, str) and (found := _WHOLE.fullmatch(value)):
        return int(found[1])
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0
    return int(value) if whole else None


def _own_names(feature: Any) -> list[str] | None:
    feature = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    return getattr(feature, "names", None)


def check_readings(values: Iterable[Any], feature: Any, labels: Sequence[str]) -> None:
    """Every label of a column is a name, or every one is an index into the names.

    Args:
        values: what the column holds, each value at least once, lists taken apart.
        feature: of `datasets`, of the column.
        labels: class names in order.

    Raises:
        SpecError: some are names and others indices alone; or the column has class names of its own that are others.
    """
    own = _own_names(feature)
    if own:
        if not set(own) <= set(labels) and not all(label.startswith(_GENERIC) for label in labels):
            said = f"the column's own names are {', '.join(own)}, the labels are {', '.join(labels)}: which is which?"
            raise SpecError(f"{said} Give model.labels: [{', '.join(own)}]", _LABEL)
        return
    numbers, names, alone = _numbers(labels), set(), set()
    for value in values:
        place = _whole(value)
        if value in labels or place in numbers:
            names.add(value if value in labels else place)
        elif place is not None and 0 <= place < len(labels):
            alone.add(place)
    if names and alone:
        one, other = min(names, key=str), min(alone)
        raise SpecError(
            f"the column holds {other}, which is no label's name but the place of {labels[other]!r} (the first is 0), "
            f"and {one}, which is a label's name: write names alone, or places alone with labels that are no numbers",
            _LABEL,
        )


def number(value: Any) -> float:
    """A number whose square is finite; ValueError for anything else."""
    if isinstance(value, str) and "_" in value:
        raise ValueError(value)
    found = float(value)
    if not abs(found) <= _LARGEST:
        raise ValueError(value)
    return found


def check_cells(rows: Any, columns: Mapping[str, str], role: str, read: Callable[[Any], Any], wanted: str) -> None:
    """Every cell of a role's column can be read; cells that are lists, entry by entry.

    Raises:
        SpecError: at the role's column, with the first that can't, and the row's text.
    """
    seen: set[Any] = set()
    for row, value in enumerate(rows[columns[role]][:]):
        for one in value if isinstance(value, list) else [value]:
            if one in seen:
                continue
            seen.add(one)
            try:
                read(one)
            except (ValueError, TypeError):
                text = columns.get("text")
                example = f"text {str(rows[row][text])[:_SHOWN]!r}" if text else f"row {row}"
                where = f"column {columns[role]!r} holds {one!r}"
                path = ("data", "columns", role)
                raise SpecError(f"{where} ({example}); expected {wanted}", path) from None


def check_labels(rows: Any, columns: Mapping[str, str], read: Callable[[Any], Any], labels: Sequence[str]) -> None:
    """`check_cells` of class labels."""
    wanted, cells = f"one of the labels {', '.join(labels)}; model.labels names them", rows.features[columns["label"]]
    if getattr(cells, "dtype", None) == "bool":
        wanted += "; which of them is true? Call them 'false' and 'true', in either order"
    check_cells(rows, columns, "label", read, wanted)


def check_texts(values: Iterable[Any], role: str, column: str) -> None:
    """Every cell holds a text.

    Raises:
        SpecError: at the role's column, with the first row that has none.
    """
    for row, value in enumerate(values):
        if value is None:
            said = f"row {row} of column {column!r} holds no text (null)"
            way = "leave it out or write an empty text (data.options: {keep_default_na: false}, where csv made it null)"
            raise SpecError(f"{said}; {way}", ("data", "columns", role))


def fits(kind: str, feature: Any) -> bool:
    """Whether a column of `datasets` can hold what a role's kind says; what a column without a value holds is not
    known. Numbers are texts where they are whole: others have more than one spelling."""
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if kind == "words":
        return inner is not None and _text(inner)
    if kind == "labels":
        return inner is not None and _plain(inner)
    if kind == "answers":
        return isinstance(feature, dict)
    if kind in ("messages", "tools"):
        if kind == "tools" and getattr(feature, "dtype", None) == "null":
            return True
        json = "Json" in (type(feature).__name__, type(inner).__name__)
        return isinstance(inner, dict) or json or getattr(feature, "dtype", None) in ("string", "large_string")
    if kind == "text":
        return _text(feature)
    return type(feature).__name__ == "Image" if kind == "image" else _plain(feature)


def _plain(feature: Any) -> bool:
    """A text, a number or a label."""
    return type(feature).__name__ in ("Value", "ClassLabel") and "binary" not in feature.dtype


def _text(feature: Any) -> bool:
    dtypes = ("string", "large_string", "int", "uint", "null")
    return type(feature).__name__ == "Value" and feature.dtype.startswith(dtypes)


KINDS = {
    "text": "text",
    "label": "one label a row",
    "labels": "a list of labels a row",
    "words": "a list of words a row",
    "number": "a number a row",
    "image": "images",
    "messages": "turns, lists of {role: ..., content: ...}",
    "tools": "tools, lists of objects",
    "answers": "answers as SQuAD writes them, {text: [...], answer_start: [...]}",
}


def columns_error(
    task: str, kind: str, role: str, column: str, others: Sequence[str], turns: bool = False
) -> SpecError:
    """What to say of a column that holds something else than the role; `others` are tasks that read what it holds, and
    `turns` says that it holds some and the task reads them elsewhere."""
    wanted = KINDS[kind]
    hint = f"; a task that reads it: {', '.join(others)}" if others else ""
    hint += "; turns, the answer the last of them, are the column `messages`" if turns else ""
    return SpecError(f"column {column!r} does not hold {wanted}, as {task} reads{hint}", ("data", "columns", role))
