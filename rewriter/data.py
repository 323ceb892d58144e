"""The data of a spec: read by `datasets`, checked against columns and labels, and encoded."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets

from .errors import SpecError, SubspanError, reason
from .resources import existing
from .spec import Data, Spec
from .tasks import TASKS, Reading, Role, columns_error, fits, task_of

_DATA = ("data",)
_SHOWN = 5


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
    data = spec.data
    if data is None:
        raise SpecError("'data' is missing: training needs it")
    parts = {name: _filter(part, data, name) for name, part in _read(data).items()}
    if "train" not in parts:
        raise SpecError(f"no split 'train', only {', '.join(parts)}", _DATA)
    if data.split:
        held = data.split.validation
        if held >= len(parts["train"]):
            raise SpecError(f"can't hold out {held} of {len(parts['train'])} rows", ("data", "split", "validation"))
        halves = parts["train"].train_test_split(test_size=held, seed=data.split.seed, shuffle=True)
        parts = {"train": halves["train"], "validation": halves["test"]}
    if "validation" not in parts:
        raise SpecError(
            "no validation data: add `split: {validation: 0.1}`, or `files: {train: ..., validation: ...}`", _DATA
        )
    train, validation = (
        _limit(parts[name], getattr(data.limit, name), data.split.seed if data.split else 0)
        for name in ("train", "validation")
    )
    for name, part in (("train", train), ("validation", validation)):
        if len(part) == 0:
            raise SpecError(f"no rows of {name} data", _DATA)
        _check_rows(spec, part, labels)
    return Rows(train, validation)


def _read(data: Data) -> dict[str, datasets.Dataset]:
    with _explained(data), _bars():
        if data.files is None:
            found = datasets.load_dataset(data.name, data.config)
            return {name: part for name, part in found.items() if name in ("train", "validation")} or dict(found)
        given = data.files if isinstance(data.files, dict) else {"train": data.files}
        files = {
            name: [existing(file, ("data", "files")) for file in ([some] if isinstance(some, str) else some)]
            for name, some in given.items()
        }
        if data.format == "imagefolder":
            return {
                name: datasets.load_dataset("imagefolder", data_dir=folders[0], split="train", **data.options)
                for name, folders in files.items()
            }
        return dict(datasets.load_dataset(data.format, data_files=files, **data.options))


@contextlib.contextmanager
def _bars() -> Iterator[None]:
    """Progress bars on a terminal alone."""
    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@contextlib.contextmanager
def _explained(data: Data) -> Iterator[None]:
    try:
        yield
    except (SubspanError, KeyboardInterrupt):
        raise
    except Exception as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, FileNotFoundError):
            raise cause from None
        path = ("data", "name") if data.files is None else ("data", "files")
        raise SpecError(f"can't read the data: {reason(cause)}", path) from error


def _filter(part: datasets.Dataset, data: Data, name: str) -> datasets.Dataset:
    for column in data.where:
        _check_column(part, column, ("data", "where", column), at_key=True)
    for role, column in data.columns.items():
        _check_column(part, column, ("data", "columns", role))
    if not data.where:
        return part
    keep = range(len(part))
    for column, wanted in data.where.items():
        allowed = wanted if isinstance(wanted, list) else [wanted]
        values = part[column]
        keep = [i for i in keep if values[i] in allowed]
    if not keep:
        seen = sorted({str(value) for value in part.unique(column)})
        shown = ", ".join(seen[:_SHOWN]) + (", ..." if len(seen) > _SHOWN else "")
        raise SpecError(f"no row of the {name} data is left; {column} holds {shown}", ("data", "where", column))
    return part.select(keep)


def _check_column(part: datasets.Dataset, column: str, path: tuple[str, ...], at_key: bool = False) -> None:
    if column not in part.column_names:
        raise SpecError(f"no column {column!r}; the data has {', '.join(part.column_names)}", path, at_key)


def _limit(part: datasets.Dataset, count: int | None, seed: int) -> datasets.Dataset:
    """A random choice, since files are often sorted by label."""
    return part if count is None or count >= len(part) else part.shuffle(seed=seed).select(range(count))


def _check_rows(spec: Spec, rows: datasets.Dataset, labels: list[str]) -> None:
    """Every column holds what the task reads from it."""
    task, columns = spec.task, spec.data.columns
    for role, column in columns.items():
        feature = rows.features[column]
        if not fits(task.roles[role].kind, feature):
            others = [name for name in TASKS if _reads(task_of(name).roles, columns, role, feature)]
            raise columns_error(task, role, column, others)
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


def encode(spec: Spec, rows: datasets.Dataset, processor: Any, labels: list[str]) -> datasets.Dataset:
    """Rows as the model reads them: token ids or pixels, and targets.

    Raises:
        SpecError: `max_length` is more than the tokenizer's model takes, or the tokenizer can't do what the task needs.
    """
    check_length(spec, getattr(processor, "model_max_length", None))
    with _bars():
        return spec.task.encode(
            rows, Reading(spec.data.columns, rows.features, processor, labels, spec.data.max_length)
        )
