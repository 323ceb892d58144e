"""A label for each word of a text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import SpecError
from .base import IGNORED, Batch, Reading, Role, Task, agreement, check_labels, guesses, name_labels, padded_lists


class TokenClassification(Task):
    """Lists of words and of their labels; a word's label stands on its first token."""

    roles = {"tokens": Role("words"), "label": Role("labels")}
    metrics = ("accuracy", "f1", "loss")
    auto = "AutoModelForTokenClassification"
    labelled = True
    smooths = True

    def configure(self, config: Any, labels: Sequence[str] | None) -> None:
        name_labels(config, labels)

    def check(self, rows: Any, columns: Mapping[str, str], labels: Sequence[str]) -> None:
        check_labels(rows, columns, self.reader(rows.features[columns["label"]], labels), labels)
        for row, (some, tags) in enumerate(zip(rows[columns["tokens"]], rows[columns["label"]], strict=True)):
            if len(some) != len(tags):
                raise SpecError(f"row {row} has {len(some)} words and {len(tags)} labels", ("data", "columns", "label"))

    def example_batch(self, model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
        inputs = self.inputs(model, batch, length).kwargs
        return {**inputs, "labels": torch.zeros_like(inputs["input_ids"])}

    def tokens(self, batch: dict[str, list], index: list[int], reading: Reading) -> dict[str, Any]:
        columns = reading.columns
        options = {"is_split_into_words": True, "truncation": True, "max_length": reading.length}
        out = reading.processor(batch[columns["tokens"]], **options)
        read = self.reader(reading.features[columns["label"]], reading.labels)
        out["labels"] = [
            _first_of_word(out.word_ids(i), [read(tag) for tag in tags])
            for i, tags in enumerate(batch[columns["label"]])
        ]
        return out

    def padded_labels(self, labels: list[Any], processor: Any) -> Tensor:
        return padded_lists(labels, processor.padding_side == "left")

    def summary(self, out: Any, targets: Batch) -> Tensor:
        return guesses(out.logits, targets["labels"])

    def measure(self, metric: str, found: np.ndarray, rows: Any) -> float:
        return agreement(metric, found)


def _first_of_word(word_ids: list[int | None], tags: list[int]) -> list[int]:
    """One label per word, on its first token."""
    before = [None, *word_ids[:-1]]
    return [IGNORED if w is None or w == b else tags[w] for w, b in zip(word_ids, before, strict=True)]
