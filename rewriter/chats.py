"""Chats made of columns: the turns of `data.chat`, with a row's cells in them."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import datasets

from .errors import SpecError
from .spec import Data, filled
from .spec.data import MADE, Place, named_in
from .tasks import fits


def with_turns(part: datasets.Dataset, data: Data) -> datasets.Dataset:
    """With a column of turns that `data.chat` makes of others, where it does.

    Raises:
        SpecError: a column holds no texts, or a cell is null, or none of those that `data.values` has.
    """
    if data.chat is None:
        return part
    named = named_in(data.chat).items()
    readers = {column: _text_reader(part.features[column], column, place, data) for column, place in named}
    cells = {column: [read(row, cell) for row, cell in enumerate(part[column])] for column, read in readers.items()}
    rows = (
        (dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)) if cells else [{}] * len(part)
    )
    turns = [json.dumps(turns_made(data, row)) for row in rows]
    column = data.columns[MADE]
    others = part.remove_columns(column) if column in part.column_names else part
    return others.add_column(column, turns)


def turns_made(data: Data, cells: Mapping[str, str], asked: bool = False) -> list[dict[str, str]]:
    """The turns of `data.chat` with the cells of a row.

    Args:
        asked: leave out the assistant's turn at the end.
    """
    turns = data.chat[:-1] if asked else data.chat
    return [{"role": role, "content": filled(text, cells)} for turn in turns for role, text in turn.items()]


def text_reader(column: str, place: Place, data: Data, names: list[str] | None = None) -> Callable[[int, Any], str]:
    """A function from the number of a row and a cell to the text that stands for it in a turn.

    Args:
        names: of a column of class labels.
    """
    wanted, csv = data.values.get(column, {}), data.format == "csv"
    values = {one: text for key, text in wanted.items() for one in (spellings(key) if csv else [as_written(key)])}

    def read(row: int, cell: Any) -> str:
        if cell is None or not isinstance(cell, str | int):  # Other numbers have more than one spelling.
            held = "null" if cell is None else repr(cell)[:40]
            raise SpecError(f"row {row} of column {column!r} holds no text ({held})", ("data", *place))
        text = names[cell] if names and isinstance(cell, int) else as_written(cell)
        if values and text not in values:
            keys = ", ".join(map(as_written, wanted))
            said = f"row {row} of column {column!r} holds {text[:40]!r}, which is none of {keys}"
            raise SpecError(said, ("data", "values", column))
        return values.get(text, text)

    return read


def _text_reader(feature: Any, column: str, place: Place, data: Data) -> Callable[[int, Any], str]:
    names = getattr(feature, "names", None)
    if not (names or fits("text", feature) or getattr(feature, "dtype", None) == "bool"):
        raise SpecError(f"column {column!r} holds no texts", ("data", *place))
    return text_reader(column, place, data, names)


def as_written(value: Any) -> str:
    """A cell as the text that a csv file has for it: true, not True."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def spellings(value: Any) -> set[str]:
    """What csv files have for a value: a truth value as YAML, pandas or a spreadsheet writes it."""
    text = str(value)
    return {text, text.lower(), text.upper()} if isinstance(value, bool) else {text}
