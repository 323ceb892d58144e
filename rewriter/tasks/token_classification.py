"""A label for each word of a text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import SpecError
from .base import (
    IGNORED,
    Batch,
    Reading,
    Role,
    Task,
    cut_off,
    name_labels,
    padded_lists,
)
from .cells import check_labels, words
from .measures import agreement, guesses


class TokenClassification(Task):
    """Lists of words and of their labels; a word's label stands on its first token."""

    asks = ("tokens",)
    roles = {"tokens": Role("words"), "label": Role("labels")}
    metrics = ("accuracy", "f1", "loss")
    auto = "AutoModelForTokenClassification"
    tag = "token-classification"
    labelled = True
    smooths = True

    def configure(self, config: Any, labels: Sequence[str] | None) -> None:
        name_labels(config, labels)

    def settle(self, processor: Any) -> None:
        """Words one by one become the tokens that they are in running text: with the space before them."""
        if not processor.is_fast:
            raise SpecError("words need a fast tokenizer, which says where tokens stand", ("model", "name"))
        if not _as_in_text(processor):
            core = processor.backend_tokenizer
            parts = json.loads(core.to_str())
            parts["pre_tokenizer"] = _spaced(parts["pre_tokenizer"])
            core.pre_tokenizer = type(core).from_str(json.dumps(parts)).pre_tokenizer
        if not _as_in_text(processor):
            said = "its tokenizer makes other tokens of single words than of a text; labels of words have no place"
            raise SpecError(said, ("model", "name"))

    def check(self, rows: Any, columns: Mapping[str, str], labels: Sequence[str]) -> None:
        for role in ("tokens", "label"):
            for row, some in enumerate(rows[columns[role]]):
                empty = some is not None and role == "tokens" and "" in some
                if some is None or None in some or empty:
                    word = "a word that is empty" if empty else "a word that is null"
                    what = "no list" if some is None else word if role == "tokens" else "a null label"
                    raise SpecError(f"row {row} holds {what} in {columns[role]!r}", ("data", "columns", role))
        check_labels(rows, columns, self.reader(rows.features[columns["label"]], labels), labels)
        for row, (some, tags) in enumerate(zip(rows[columns["tokens"]], rows[columns["label"]], strict=True)):
            if len(some) != len(tags):
                raise SpecError(f"row {row} has {len(some)} words and {len(tags)} labels", ("data", "columns", "label"))

    def example_batch(self, model: nn.Module, batch: int, length: int, processor: Any = None) -> dict[str, Tensor]:
        inputs = self.inputs(model, batch, length, processor).kwargs
        return {**inputs, "labels": torch.zeros_like(inputs["input_ids"])}

    def tokens(self, batch: dict[str, list], index: list[int], reading: Reading) -> dict[str, Any]:
        columns = reading.columns
        out = cut_off(reading, [words(some) for some in batch[columns["tokens"]]], is_split_into_words=True)
        read = self.reader(reading.features[columns["label"]], reading.labels)
        out["labels"] = [
            _first_of_word(out.word_ids(i), [read(tag) for tag in tags])
            for i, tags in enumerate(batch[columns["label"]])
        ]
        return out

    def padded_labels(self, labels: list[Any]) -> Tensor:
        return padded_lists(labels)

    def blank(self, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        return {"label": [labels[0]] * len(row["tokens"])}

    def answer(self, out: Any, targets: Batch, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        """A label and its probability for each word, as far as the text was read."""
        scores, places = out.logits[targets["labels"] != IGNORED].double().softmax(-1).max(-1)
        found = [labels[place] for place in places.tolist()]
        return {"tokens": list(row["tokens"][: len(found)]), "labels": found, "scores": scores.tolist()}

    def summary(self, out: Any, targets: Batch) -> Tensor:
        return guesses(out.logits, targets["labels"])

    def measure(self, metric: str, found: np.ndarray, rows: Any) -> float:
        return agreement(metric, found)


def _as_in_text(processor: Any) -> bool:
    """Whether a second word's tokens are those that it has after a space."""
    ids = lambda text, **options: processor(text, add_special_tokens=False, **options)["input_ids"]  # noqa: E731
    first, running, split = ids("one"), ids("one two"), ids(["one", "two"], is_split_into_words=True)
    tail = running[len(first) :]
    return len(tail) > 0 and split[-len(tail) :] == tail and len(split) > len(tail)


def _spaced(part: Any) -> Any:
    """A pre-tokeniser's description, with a space before each word."""
    if isinstance(part, list):
        return [_spaced(one) for one in part]
    if not isinstance(part, dict):
        return part
    space = {"ByteLevel": {"add_prefix_space": True}, "Metaspace": {"prepend_scheme": "always"}}
    return {key: _spaced(value) for key, value in part.items()} | space.get(part.get("type"), {})


def _first_of_word(word_ids: list[int | None], tags: list[int]) -> list[int]:
    """One label per word, on its first token."""
    before = [None, *word_ids[:-1]]
    return [IGNORED if w is None or w == b else tags[w] for w, b in zip(word_ids, before, strict=True)]
