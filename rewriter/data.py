"""The data of a spec: read by `datasets`, checked against columns and labels, and encoded."""

import contextlib
import hashlib
import inspect
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from .chats import spellings, with_turns
from .errors import SpecError, reason
from .files import aside, cache_folder, read_json, write_json
from .sources import bars, read
from .spec import Data, Spec, Turns
from .spec.data import Part, named_in
from .tasks import (
    TASKS,
    Question,
    Reading,
    Role,
    check_readings,
    check_texts,
    check_turns,
    clocked,
    columns_error,
    fits,
    objects_of,
    task_of,
    turns_of,
    words,
)

_DATA = ("data",)
_SHOWN = 5
_FEW = 1000  # Rows that are encoded faster than they are read again.
_SAID = "notes.json"
# The part of a mixture that a row is of, and its number in the file of that.
PART, ROW = "subspan.part", "subspan.row"
_NUMBER = re.compile(r"row (\d+)")


@dataclass
class Rows:
    """Checked rows, as read."""

    train: datasets.Dataset
    validation: datasets.Dataset


def load_rows(spec: Spec, labels: list[str]) -> Rows:
    """Read, filter, split, limit and check the data of a spec.

    Args:
        spec: its `data` section is read.
        labels: class names in order; empty for tasks without classes.

    Raises:
        SpecError: at the place in the spec that does not fit: no data, no such file or column, nothing left after the
            filter, too few rows to split, a label outside `labels`.
    """
    if spec.data is None:
        raise SpecError("'data' is missing: training needs it")
    with bars():
        return _rows(spec, _parts(spec, labels) if spec.data.mixture is None else _mixed(spec, labels))


def _parts(spec: Spec, labels: list[str]) -> dict[str, datasets.Dataset]:
    """The parts of what is one data set, filtered and checked: before a split or a limit hides some of it, and while
    rows have the numbers that they have in the file."""
    data, roles = spec.data, spec.task.roles
    texts = [column for role, column in data.columns.items() if roles[role].kind in ("text", "label")]
    with _decoded():
        parts = read(data, [*texts, *named_in(data.chat or [])])
        for name, whole in parts.items():
            part = _filter(whole, data, name)
            with _numbered(part[ROW]):
                parts[name] = _own(spec, with_turns(part, data))
                if len(part):
                    _check_rows(spec, parts[name], labels)
        _check_labels(spec, parts, labels)
    return parts


def _mixed(spec: Spec, labels: list[str]) -> dict[str, datasets.Dataset]:
    """The parts of a mixture, one after the other, columns called as their roles; `PART` says which one a row is of."""
    mixed: dict[str, list[datasets.Dataset]] = {}
    for i, one in enumerate(spec.data.mixture):
        alone = spec.model_copy(update={"data": spec.data.of_part(one)})
        with _at_part(i):
            for name, part in _parts(alone, labels).items():
                if len(part):
                    numbered = _like_others(alone, part).add_column(ROW, np.array(part[ROW]))
                    mixed.setdefault(name, []).append(numbered.add_column(PART, [i] * len(part)))
    try:
        return {name: datasets.concatenate_datasets(some) for name, some in mixed.items()}
    except (ValueError, TypeError) as error:
        said = f"its parts hold different things in columns of one role: {reason(error)}"
        raise SpecError(said, ("data", "mixture")) from None


@contextlib.contextmanager
def _at_part(i: int) -> Iterator[None]:
    """Mistakes of the data as those of a part of its mixture."""
    try:
        yield
    except SpecError as error:
        own = len(error.path) > 1 and error.path[0] == "data" and error.path[1] in Part.model_fields
        path = ("data", "mixture", i, *error.path[1:]) if own else error.path
        raise type(error)(error.message, path, error.at_key) from None


def _like_others(spec: Spec, part: datasets.Dataset) -> datasets.Dataset:
    """Columns called as their roles: texts as texts, turns and tools as JSON, in the words of templates."""
    columns, made = spec.data.columns, {}
    for role, column in columns.items():
        kind = spec.task.kind(role, columns)
        if kind == "messages":
            made[role] = [json.dumps(turns_of(cell, *turn_names(spec.data))) for cell in part[column]]
        elif kind == "tools":
            made[role] = [json.dumps(objects_of(cell)) for cell in part[column]]
        elif kind == "text":
            made[role] = words(part[column])
    kept = {role: column for role, column in columns.items() if role not in made}
    if len(set(kept.values())) < len(kept):
        raise SpecError("each role has a column of its own in a mixture", ("data", "columns"))
    text = datasets.Value("large_string")
    others = part.select_columns(list(kept.values())).rename_columns({kept[role]: role for role in kept})
    for role in [role for role, feature in others.features.items() if getattr(feature, "dtype", None) == "string"]:
        others = others.cast_column(role, text)
    texts = datasets.Dataset.from_dict(made, datasets.Features(dict.fromkeys(made, text)))
    return datasets.concatenate_datasets([one for one in (texts, others) if one.column_names], axis=1)


def _weighted(train: datasets.Dataset, data: Data) -> datasets.Dataset:
    """Rows of the parts of a mixture, in the shares that its weights are: so many that every row is there, and those of
    parts that are too small for their share several times; or as many as `limit.train` says, chosen at random."""
    part, seed = np.array(train[PART]), data.split.seed if data.split else 0
    weights = np.array([one.weight for one in data.mixture])
    counts = np.bincount(part, minlength=len(weights))
    for i in np.flatnonzero(counts == 0):
        raise SpecError("no rows of training data are left of it", ("data", "mixture", int(i)))
    shares = weights / weights.sum()
    most = math.ceil((counts / shares).max() - 1e-9)
    total = min(most, data.limit.train or most)
    whole = np.floor(shares * total + 1e-9).astype(int)
    rest = np.argsort(whole - shares * total, kind="stable")[: total - whole.sum()]
    whole[rest] += 1
    chosen, generator = [], np.random.default_rng(seed)
    for i, wanted in enumerate(whole):
        if not wanted:
            raise SpecError(f"by its weight none of {total} rows is of it", ("data", "mixture", i, "weight"))
        own = np.flatnonzero(part == i)
        chosen += [generator.permutation(own)[: min(wanted - start, len(own))] for start in range(0, wanted, len(own))]
    return train.select(np.sort(np.concatenate(chosen)))


@contextlib.contextmanager
def _numbered(numbers: Sequence[int]) -> Iterator[None]:
    """The row that a mistake starts with by its number in the file, where a filter left others out."""
    try:
        yield
    except SpecError as error:
        if not (found := _NUMBER.match(error.message)):
            raise
        said = f"row {numbers[int(found[1])]}{error.message[found.end() :]}"
        raise type(error)(said, error.path, error.at_key) from None


@contextlib.contextmanager
def _decoded() -> Iterator[None]:
    """Bytes that are no text are found when a cell is read."""
    try:
        yield
    except UnicodeDecodeError as error:
        said = f"the data holds bytes that are not {error.encoding} ({error.reason})"
        raise SpecError(f"{said}; set data.options: {{encoding: ...}}", ("data", "files")) from None


def _rows(spec: Spec, parts: dict[str, datasets.Dataset]) -> Rows:
    """The parts, split and limited."""
    data = spec.data
    if "train" not in parts:
        raise SpecError(f"no split 'train', only {', '.join(parts)}", _DATA)
    if data.split and "validation" in parts:
        raise SpecError("the data has validation rows of its own: leave out `split`", ("data", "split"))
    if data.split:
        held = data.split.validation
        rows, share = len(parts["train"]), isinstance(held, float)
        if (math.ceil(held * rows) if share else held) >= rows:
            said = f"a share of {held} of {rows} rows leaves none to train on"
            said = said if share else f"can't hold out {held} of {rows} rows"
            raise SpecError(said, ("data", "split", "validation"))
        halves = parts["train"].train_test_split(test_size=held, seed=data.split.seed, shuffle=True)
        parts = {"train": halves["train"], "validation": halves["test"]}
    if "validation" not in parts:
        raise SpecError(
            "no validation data: add `split: {validation: 0.1}`, or `files: {train: ..., validation: ...}`", _DATA
        )
    for name in ("train", "validation"):
        if len(parts[name]) == 0:
            raise SpecError(f"no rows of {name} data", _DATA)
    seed, found = data.split.seed if data.split else 0, []
    for name in ("train", "validation"):
        weighted = name == "train" and data.mixture is not None and data.mixture[0].weight is not None
        found.append(_weighted(parts[name], data) if weighted else _limit(parts[name], getattr(data.limit, name), seed))
    return Rows(*found)


def _filter(part: datasets.Dataset, data: Data, name: str) -> datasets.Dataset:
    """The rows that `where` keeps, with their numbers as `ROW`."""
    for column in data.where:
        _check_column(part, column, ("data", "where", column), at_key=True)
    for column, place in data.reads.items():
        _check_column(part, column, ("data", *place))
    part = part.add_column(ROW, np.arange(len(part)))
    if not data.where:
        return part
    keep = range(len(part))
    for column, wanted in data.where.items():
        allowed = wanted if isinstance(wanted, list) else [wanted]
        if type(part.features[column]).__name__ not in ("Value", "ClassLabel"):
            said = f"{column} holds no texts, numbers or truth values, which a filter compares"
            raise SpecError(said, ("data", "where", column))
        values, csv = part[column][:], data.format == "csv"
        # A csv file's own texts: 1 is written 1.
        written = {text for one in allowed for text in spellings(one)} if csv else set()
        keep = [i for i in keep if values[i] in allowed or (csv and values[i] in written)]
    if not keep:
        seen = sorted({str(value) for value in part.unique(column)})
        shown = ", ".join(seen[:_SHOWN]) + (", ..." if len(seen) > _SHOWN else "")
        raise SpecError(f"no row of the {name} data is left; {column} holds {shown}", ("data", "where", column))
    return part.select(keep)


def _own(spec: Spec, part: datasets.Dataset) -> datasets.Dataset:
    """The columns that the task reads, and no other; of images the bytes, or files of the folder that is named.

    Raises:
        SpecError: an image is a path that leads elsewhere.
    """
    data = spec.data
    part = part.select_columns([*dict.fromkeys(data.columns.values()), ROW])
    for role, column in data.columns.items():
        if spec.task.roles[role].kind != "image" or not fits("image", part.features[column]):
            continue
        raw = part.cast_column(column, datasets.Image(decode=False))
        for row, image in enumerate(raw[column]):
            held = None
            if image is None or (image["bytes"] is None and data.format != "imagefolder" and data.files is not None):
                held = "no image" if image is None else f"a path, {image['path']!r}, and no image"
            elif why := _broken(image):
                held = f"no picture that can be read: {why}"
            if held:
                raise SpecError(f"row {row} of column {column!r} holds {held}", ("data", "columns", role))
    return part


def _broken(image: Mapping[str, Any]) -> str | None:
    """Why a picture (bytes, or the path of a file) can't be opened; its pixels are not read."""
    try:
        with Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]) as opened:
            opened.verify()
    except Exception as error:  # Of any of PIL's formats.
        return reason(error)
    return None


def _check_column(part: datasets.Dataset, column: str, path: tuple[str, ...], at_key: bool = False) -> None:
    if column not in part.column_names:
        raise SpecError(f"no column {column!r}; the data has {', '.join(part.column_names)}", path, at_key)


def _check_labels(spec: Spec, parts: Mapping[str, datasets.Dataset], labels: list[str]) -> None:
    """Names or indices: that is decided for the column of all parts."""
    column = spec.data.columns.get("label")
    if spec.task.labelled and column:
        values: set[Any] = set()
        for part in (part for part in parts.values() if len(part)):
            cells = part[column] if isinstance(part[0][column], list) else part.unique(column)
            values.update(one for cell in cells for one in (cell if isinstance(cell, list) else [cell]))
            check_readings(values, part.features[column], labels)


def _limit(part: datasets.Dataset, count: int | None, seed: int) -> datasets.Dataset:
    """A random choice, since files are often sorted by label."""
    return part if count is None or count >= len(part) else part.shuffle(seed=seed).select(range(count))


def _check_rows(spec: Spec, rows: datasets.Dataset, labels: list[str]) -> None:
    """Every column holds what the task reads from it."""
    task, columns = spec.task, spec.data.columns
    for role, column in columns.items():
        feature = rows.features[column]
        if not fits(task.kind(role, columns), feature):
            others = [name for name in TASKS if _reads(task_of(name).roles, columns, role, feature)]
            turns = "messages" in task.roles and fits("messages", feature)
            raise columns_error(task.name, task.kind(role, columns), role, column, others, turns)
        if task.kind(role, columns) == "text":
            check_texts(rows[column][:], role, column)
        if task.kind(role, columns) == "messages":
            check_turns(rows[column], column, role, *turn_names(spec.data))
    task.check(rows, columns, labels)


def _reads(roles: Mapping[str, Role], columns: Mapping[str, str], role: str, feature: Any) -> bool:
    """Whether a task with these roles reads the columns, and from one of them what it holds."""
    needed = {name for name, one in roles.items() if one.required}
    return role in roles and needed <= columns.keys() and fits(roles[role].kind, feature)


def check_length(spec: Spec, most: int | None, rows: int = 0) -> None:
    """Refuse sequences of more than `most` tokens, together with `rows` that transforms put before them.

    Raises:
        SpecError: at `data.max_length`.
    """
    if spec.data and most is not None and spec.data.max_length + rows > most:
        own = f", {rows} of them the transforms'" if rows else ""
        raise SpecError(f"the model takes at most {most} tokens{own}", ("data", "max_length"))


def encode(
    spec: Spec, rows: datasets.Dataset, processor: Any, labels: list[str], notes: list[str] | None = None
) -> datasets.Dataset:
    """Rows as the model reads them: token ids or pixels, and targets. Rows with nothing to learn from are left out.

    Args:
        notes: gets a sentence for everything there is to say of the rows: what is cut, what is left out.

    Raises:
        SpecError: `max_length` is more than the tokenizer's model takes, or the tokenizer can't do what the task needs,
            or nothing is left.
    """
    check_length(spec, getattr(processor, "model_max_length", None))
    reading = _reading(spec.data, rows, processor, labels)
    rows = rows.remove_columns([name for name in (ROW, PART) if name in rows.column_names])
    notes = [] if notes is None else notes
    known = len(notes)
    place = _kept(spec, rows, reading)
    if place is not None and (there := _reread(place, notes)) is not None:
        return there
    with bars():
        try:
            found = spec.task.encode(rows, reading, notes)
        except Exception as error:
            if type(error) is not Exception:  # As tokenizers raises, of an unknown word, say.
                raise
            raise SpecError(f"its tokenizer can't read the rows: {reason(error)}", ("model", "name")) from None
    if len(found) == 0:
        said = "".join(f"; {note}" for note in notes[known:] if "nothing to learn" not in note)
        place = ("data", "max_length") if "data.max_length" in said else _DATA
        raise SpecError(f"none of {len(rows)} rows has anything to learn from{said}", place)
    if place is not None:
        with contextlib.suppress(OSError), bars():
            place.parent.mkdir(parents=True, exist_ok=True)
            with aside(place) as (new,):
                found.save_to_disk(new)
                write_json(new / _SAID, {"notes": notes})
    return found


def unseen(spec: Spec, rows: datasets.Dataset, labels: list[str]) -> list[str]:
    """What there is to say of labels that no row has."""
    counts = spec.task.label_counts(rows, spec.data.columns, labels) if labels else []
    none = [label for label, count in zip(labels, counts, strict=True) if not count]
    which = ", ".join(none[:_SHOWN]) + (", ..." if len(none) > _SHOWN else "")
    return [f"{len(none)} of {len(labels)} labels stand in no row: {which}"] if none else []


def _reading(data: Data, rows: datasets.Dataset, processor: Any, labels: Sequence[str] = ()) -> Reading:
    places = [np.array(rows[name]) if name in rows.column_names else None for name in (ROW, PART)]
    how = (data.max_length, data.long, data.loss, *turn_names(data))
    return Reading(data.columns, rows.features, processor, labels, *how, *places)


def _kept(spec: Spec, rows: datasets.Dataset, reading: Reading) -> Path | None:
    """Where encoded rows are kept: named by all that decides what they are, the rows, the tokenizer and its template,
    the options, and the code; None where they are not kept: of a tokenizer that can't be written down, or of few."""
    core = getattr(reading.processor, "backend_tokenizer", None)
    if core is None or len(rows) < _FEW:
        return None
    processor = [core.to_str(), reading.processor.chat_template, reading.processor.special_tokens_map]
    options = [spec.model.task, spec.model.task_options, dict(reading.columns), list(reading.labels), reading.length]
    options += [date.today().isoformat()] if clocked(reading.processor) else []
    options += [reading.long, reading.loss, dict(reading.turns), dict(reading.spoken)]
    places = (reading.numbers, reading.parts)
    options += [None if one is None else hashlib.sha256(one).hexdigest() for one in places]
    found = hashlib.sha256(json.dumps([processor, options, digest_of(rows), _code()], default=str).encode())
    return cache_folder("encoded") / found.hexdigest()


@cache
def _code() -> str:
    """Of what encodes: the tasks' own files, and the libraries."""
    found = hashlib.sha256()
    for file in sorted(Path(inspect.getfile(Reading)).parent.glob("*.py")):
        found.update(file.read_bytes())
    return " ".join(
        [found.hexdigest(), *(f"{name} {version(name)}" for name in ("transformers", "tokenizers", "datasets"))]
    )


def _reread(place: Path, notes: list[str]) -> datasets.Dataset | None:
    """Encoded rows that are kept, with what there was to say of them; None where there are none that can be read."""
    try:
        with bars():
            found = datasets.load_from_disk(place)
        notes += read_json(place / _SAID)["notes"]
    except Exception:  # Of files that are not there, or broken: they are made again.
        return None
    return found


def questions_of(spec: Spec, rows: datasets.Dataset, processor: Any) -> list[Question]:
    """What the first rows ask that have an answer, as many as the spec says; none where it wants none written.

    Raises:
        SpecError: no row has one.
    """
    data, settings, found = spec.data, spec.writing, []
    if settings is None:
        return found
    reading = _reading(data, rows, processor)
    for row in rows:
        if (one := spec.task.question(row, reading)) is not None:
            found.append(one)
        if len(found) == settings.rows:
            break
    if not found:
        place = ("train", "generate" if spec.train.generate else "metric")
        raise SpecError(f"none of {len(rows)} validation rows has an answer to compare with", place)
    return found


def short_enough(questions: list[Question], longest: int | None) -> tuple[list[Question], list[str]]:
    """The questions that a model can answer, and what there is to say of the others.

    Args:
        longest: sequence that the model takes; None: any.

    Raises:
        SpecError: none is.
    """
    kept = [one for one in questions if longest is None or len(one.ids) < longest]
    if left := len(questions) - len(kept):
        said = f"{left} of {len(questions)} questions have {longest} tokens or more, as many as the model reads"
        if not kept:
            raise SpecError(said, _DATA)
        return kept, [f"validation: {said}: no answer to them is written"]
    return kept, []


def turn_names(data: Data | None) -> tuple[dict[str, str], dict[str, str]]:
    """What a turn's role and content are called, and roles as written -> as templates call them."""
    turns = (data and data.turns) or Turns()
    return {"role": turns.role, "content": turns.content}, turns.roles


def tie(rows: datasets.Dataset, encoded: datasets.Dataset, processor: Any) -> str:
    """What a run knows its data by: the encoded rows, or, where their template reads the clock, the rows as read."""
    return digest_of(rows if clocked(processor) else encoded)


def digest_of(rows: datasets.Dataset) -> str:
    """SHA-256 of the cells of all rows, in order."""
    found = hashlib.sha256(" ".join(rows.column_names).encode())
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for batch in table.combine_chunks().to_batches():
            found.update(batch.serialize())
    return found.hexdigest()
