"""A number for a text, or for a pair of texts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import (
    PLAIN,
    Batch,
    Criterion,
    Role,
    Task,
)
from .cells import check_cells, number
from .measures import correlation


class Regression(Task):
    """Mean squared error of one output."""

    roles = {**Task.roles, "label": Role("number")}
    metrics = ("mse", "pearson", "loss")
    auto = "AutoModelForSequenceClassification"

    def configure(self, config: Any, labels: Sequence[str] | None) -> None:
        config.num_labels, config.problem_type = 1, "regression"

    def check(self, rows: Any, columns: Mapping[str, str], labels: Sequence[str]) -> None:
        check_cells(rows, columns, "label", number, "a finite number, of 1e18 at most")

    def reader(self, feature: Any, labels: Sequence[str]) -> Callable[[Any], Any]:
        return number

    def example_batch(self, model: nn.Module, batch: int, length: int, processor: Any = None) -> dict[str, Tensor]:
        example = super().example_batch(model, batch, length, processor)
        return {**example, "labels": example["labels"].float()}

    def count(self, targets: Batch, criterion: Criterion = PLAIN) -> Tensor:
        return torch.tensor(len(targets["labels"]), device=targets["labels"].device)

    def loss(self, out: Any, targets: Batch, criterion: Criterion = PLAIN) -> Tensor:
        """The sum of squared errors of logits (batch, 1)."""
        guess = out.logits.squeeze(-1)
        wide = torch.promote_types(guess.dtype, torch.float32)
        return F.mse_loss(guess.to(wide), targets["labels"].to(wide), reduction="sum")

    def blank(self, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        return {"label": 0.0}

    def answer(self, out: Any, targets: Batch, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        """The number."""
        return {"value": out.logits[0].double().item()}

    def summary(self, out: Any, targets: Batch) -> Tensor:
        """(batch, 2): guess and truth."""
        return torch.cat([out.logits.float(), targets["labels"].float().unsqueeze(1)], dim=1)

    def measure(self, metric: str, found: np.ndarray, rows: Any) -> float:
        guess, truth = found.T
        return float(np.mean((guess - truth) ** 2)) if metric == "mse" else correlation(guess, truth)
