"""The data of a spec: read by `datasets`, checked against columns and labels, encoded, and padded per batch."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from .errors import SpecError, SubspanError, reason
from .resources import existing
from .spec import Data, Spec

IGNORED = -100
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
        check_labels(spec, part, labels)
    return Rows(train, validation)


def _read(data: Data) -> dict[str, datasets.Dataset]:
    with _explained(data):
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


def check_labels(spec: Spec, rows: datasets.Dataset, labels: list[str]) -> None:
    """Every label of a classification task is one of `labels`; every target of a regression is a finite number.

    Raises:
        SpecError: at `data.columns.label`, with the first value that is not.
    """
    task = spec.model.task
    if "classification" not in task and task != "regression":
        return
    path = ("data", "columns", "label")
    column = rows[spec.data.columns["label"]]
    read = label_reader(spec, rows, labels)
    seen: set[Any] = set()
    for row, value in enumerate(column):
        values = value if isinstance(value, list) else [value]
        for one in values:
            if one in seen:
                continue
            seen.add(one)
            try:
                read(one)
            except (ValueError, TypeError):
                wanted = "a finite number" if task == "regression" else f"one of the labels {', '.join(labels)}"
                where = f"column {spec.data.columns['label']!r} holds {one!r}"
                raise SpecError(f"{where} ({_example(spec, rows, row)}); expected {wanted}", path) from None


def _example(spec: Spec, rows: datasets.Dataset, row: int) -> str:
    text = spec.data.columns.get("text")
    return f"text {str(rows[row][text])[:40]!r}" if text else f"row {row}"


def label_reader(spec: Spec, rows: datasets.Dataset, labels: list[str]) -> Callable[[Any], int | float]:
    """A function from a label as written to a class index, or to a number for regression.

    A value is a class name, or else an index into the names. It raises ValueError for anything else.
    """
    index, task = {label: i for i, label in enumerate(labels)}, spec.model.task
    feature = rows.features[spec.data.columns["label"]]
    feature = getattr(feature, "feature", feature)
    names = feature.names if isinstance(feature, datasets.ClassLabel) and set(feature.names) <= set(labels) else None

    def read(value: Any) -> int | float:
        if task == "regression":
            number = float(value)
            if number != number or abs(number) == float("inf"):
                raise ValueError(value)
            return number
        if names and isinstance(value, int):
            value = names[value]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if str(value) in index:
            return index[str(value)]
        if isinstance(value, int) and 0 <= value < len(labels):
            return int(value)
        raise ValueError(value)

    return read


def check_length(spec: Spec, most: int | None, rows: int = 0) -> None:
    """Refuse sequences of more than `most` tokens, together with `rows` that transforms put before them.

    Raises:
        SpecError: at `data.max_length`.
    """
    if spec.data and most is not None and spec.data.max_length + rows > most:
        own = f", {rows} of them the transforms'" if rows else ""
        raise SpecError(f"the model takes at most {most} tokens{own}", ("data", "max_length"))


def encode(spec: Spec, rows: datasets.Dataset, processor: Any, labels: list[str]) -> datasets.Dataset:
    """Rows as the model reads them: token ids or pixels, and `labels`.

    Next-token labels are shifted already: position t holds the token of t + 1.

    Raises:
        SpecError: `max_length` is more than the tokenizer's model takes.
    """
    columns, task, length = spec.data.columns, spec.model.task, spec.data.max_length
    read = label_reader(spec, rows, labels) if "label" in columns else None
    if task == "image-classification":

        def pixels(batch: dict[str, list]) -> dict[str, Any]:
            images = [image.convert("RGB") for image in batch[columns["image"]]]
            out = processor(images=images, return_tensors="pt")
            return {"pixel_values": out["pixel_values"], "labels": [read(value) for value in batch[columns["label"]]]}

        return rows.with_transform(pixels)
    check_length(spec, processor.model_max_length)

    def words(values: list[Any]) -> list[str]:
        return ["" if value is None else str(value) for value in values]

    def tokens(batch: dict[str, list]) -> dict[str, Any]:
        options = {"truncation": True, "max_length": length}
        if task == "token-classification":
            out = processor(batch[columns["tokens"]], is_split_into_words=True, **options)
            out["labels"] = [
                _first_of_word(out.word_ids(i), [read(tag) for tag in tags])
                for i, tags in enumerate(batch[columns["label"]])
            ]
            return out
        pair = words(batch[columns["text_pair"]]) if "text_pair" in columns else None
        out = processor(words(batch[columns["text"]]), pair, **options)
        if task == "causal-lm":
            out["labels"] = [[*ids[1:], IGNORED] for ids in out["input_ids"]]
        elif task == "seq2seq-lm":
            out["labels"] = processor(text_target=words(batch[columns["label"]]), **options)["input_ids"]
        else:
            out["labels"] = [read(value) for value in batch[columns["label"]]]
        return out

    return rows.map(tokens, batched=True, remove_columns=rows.column_names, load_from_cache_file=False, desc="encode")


def _first_of_word(word_ids: list[int | None], tags: list[int]) -> list[int]:
    """One label per word, on its first token."""
    before = [None, *word_ids[:-1]]
    return [IGNORED if w is None or w == b else tags[w] for w, b in zip(word_ids, before, strict=True)]


def collator(
    processor: Any, input_names: list[str], start: int | None
) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """A function from encoded rows to one batch, padded to its longest row.

    Args:
        processor: the tokenizer; it pads on its own side.
        input_names: what the model reads.
        start: the id that starts a decoder's input (encoder-decoder models).
    """

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        labels = [row["labels"] for row in rows]
        if "pixel_values" in input_names:
            return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": torch.tensor(labels)}
        keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in rows[0]]
        batch = dict(processor.pad([{key: row[key] for key in keys} for row in rows], return_tensors="pt"))
        batch.setdefault("token_type_ids", torch.zeros_like(batch["input_ids"]))
        if isinstance(labels[0], list):
            left = processor.padding_side == "left" and start is None
            width = max(map(len, labels))
            pads = [[IGNORED] * (width - len(row)) for row in labels]
            labels = [pad + row if left else row + pad for pad, row in zip(pads, labels, strict=True)]
        batch["labels"] = torch.tensor(labels)
        if "decoder_input_ids" in input_names:
            shifted = batch["labels"].roll(1, dims=1)
            shifted[:, 0] = start
            batch["decoder_input_ids"] = shifted.masked_fill(shifted == IGNORED, processor.pad_token_id)
        return {name: batch[name] for name in (*input_names, "labels")}

    return collate
