"""One of several labels for a text, or for a pair of texts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .base import (
    Batch,
    Task,
    name_labels,
)
from .cells import check_labels
from .measures import agreement, guesses


class SequenceClassification(Task):
    """One label a row."""

    metrics = ("accuracy", "f1", "matthews_correlation", "loss")
    auto = "AutoModelForSequenceClassification"
    labelled = True
    smooths = True

    def configure(self, config: Any, labels: Sequence[str] | None) -> None:
        name_labels(config, labels, "single_label_classification")

    def check(self, rows: Any, columns: Mapping[str, str], labels: Sequence[str]) -> None:
        check_labels(rows, columns, self.reader(rows.features[columns["label"]], labels), labels)

    def summary(self, out: Any, targets: Batch) -> Tensor:
        return guesses(out.logits, targets["labels"])

    def measure(self, metric: str, found: np.ndarray, rows: Any) -> float:
        return agreement(metric, found)
