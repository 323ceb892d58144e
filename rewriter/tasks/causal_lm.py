"""The next token of a text."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .base import IGNORED, Batch, Reading, Role, Task, likelihoods, padded_lists, perplexity, tokenised


class CausalLM(Task):
    """Cross entropy of each next token; labels are shifted already: position t holds the token of t + 1."""

    roles = {"text": Role("text")}
    metrics = ("perplexity", "loss", "accuracy")
    auto = "AutoModelForCausalLM"
    headed = False
    smooths = True

    def example_batch(self, model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
        inputs = self.inputs(model, batch, length).kwargs
        return {**inputs, "labels": torch.zeros_like(inputs["input_ids"])}

    def tokens(self, batch: dict[str, list], index: list[int], reading: Reading) -> dict[str, Any]:
        out = tokenised(batch, reading)
        out["labels"] = [[*ids[1:], IGNORED] for ids in out["input_ids"]]
        return out

    def padded_labels(self, labels: list[Any], processor: Any) -> Tensor:
        return padded_lists(labels, processor.padding_side == "left")

    def summary(self, out: Any, targets: Batch) -> Tensor:
        return likelihoods(out.logits, targets["labels"])

    def measure(self, metric: str, found: np.ndarray, rows: Any) -> float:
        return perplexity(metric, found)
