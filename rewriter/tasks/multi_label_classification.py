"""Any number of labels for a text, each by itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SpecError
from .base import PLAIN, Batch, Criterion, Reading, Role, Task, name_labels, tokenised
from .cells import check_labels

THRESHOLD = 0.5


class MultiLabelClassification(Task):
    """A list of labels a row, an empty one too: binary cross entropy; a label holds where its sigmoid is over 0.5."""

    roles = {**Task.roles, "label": Role("labels")}
    metrics = ("micro_f1", "macro_f1", "loss")
    auto = "AutoModelForSequenceClassification"
    labelled = True
    smooths = True

    def configure(self, config: Any, labels: Sequence[str] | None) -> None:
        name_labels(config, labels, "multi_label_classification")

    def check(self, rows: Any, columns: Mapping[str, str], labels: Sequence[str]) -> None:
        for row, value in enumerate(rows[columns["label"]]):
            if value is None:
                said = f"row {row} holds no list of labels; a row without a label has an empty one"
                raise SpecError(said, ("data", "columns", "label"))
        check_labels(rows, columns, self.reader(rows.features[columns["label"]], labels), labels)
        lists = rows[columns["label"]]
        # Of two labels a row of zeros and ones repeats no number where one holds: then every row names both.
        every = len(labels) > 1 and all(value and len(value) == len(labels) for value in lists)
        for row, value in enumerate(lists):
            if value and not isinstance(value[0], str) and (every or len(set(value)) != len(value)):
                said = f"row {row} holds {value}; not zeros and ones, but the labels that hold are read, each once"
                raise SpecError(said, ("data", "columns", "label"))

    def example_batch(self, model: nn.Module, batch: int, length: int, processor: Any = None) -> dict[str, Tensor]:
        example = super().example_batch(model, batch, length, processor)
        size = (batch, model.config.num_labels)
        return {**example, "labels": torch.zeros(size, device=example["labels"].device)}

    def tokens(self, batch: dict[str, list], index: list[int], reading: Reading) -> dict[str, Any]:
        out = tokenised(batch, reading)
        column = reading.columns["label"]
        read = self.reader(reading.features[column], reading.labels)
        chosen = [{read(one) for one in value or ()} for value in batch[column]]
        out["labels"] = [[float(i in some) for i in range(len(reading.labels))] for some in chosen]
        return out

    def count(self, targets: Batch, criterion: Criterion = PLAIN) -> Tensor:
        rows, classes = targets["labels"].shape
        weights = torch.ones(classes) if criterion.weights is None else criterion.weights
        return rows * weights.sum().to(targets["labels"].device)

    def loss(self, out: Any, targets: Batch, criterion: Criterion = PLAIN) -> Tensor:
        """Binary cross entropy with logits (batch, classes), summed; a smoothed target is between 0 and 1."""
        wide = out.logits.to(torch.promote_types(out.logits.dtype, torch.float32))
        truth = targets["labels"].to(wide.dtype)
        truth = truth * (1 - criterion.smoothing) + criterion.smoothing / 2
        weights = None if criterion.weights is None else criterion.weights.to(wide)
        return F.binary_cross_entropy_with_logits(wide, truth, weights, reduction="sum")

    def summary(self, out: Any, targets: Batch) -> Tensor:
        """(batch, 2 classes): guesses, then truths, as 0 and 1."""
        return torch.cat([(out.logits.sigmoid() > THRESHOLD).float(), targets["labels"].float()], dim=1)

    def measure(self, metric: str, found: np.ndarray, rows: Any) -> float:
        from sklearn import metrics as sk

        guess, truth = np.split(found.astype(int), 2, axis=1)
        return float(sk.f1_score(truth, guess, average=metric.removesuffix("_f1"), zero_division=0))

    def blank(self, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        return {"label": [labels[0]]}

    def answer(self, out: Any, targets: Batch, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        """The labels that hold, and the probability of each."""
        scores = dict(zip(labels, out.logits[0].double().sigmoid().tolist(), strict=True))
        return {"labels": [name for name, score in scores.items() if score > THRESHOLD], "scores": scores}

    def metadata(self, labels: Sequence[str]) -> dict[str, Any]:
        return {"threshold": THRESHOLD}
