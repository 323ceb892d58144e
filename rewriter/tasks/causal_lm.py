"""The next token of a text."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .base import IGNORED, Batch, Reading, Role, Task, likelihoods, padded_lists, perplexity, tokenised


class CausalLM(Task):
    """Cross entropy of each next token, the end of the text among them; labels are shifted already: position t holds
    the token of t + 1."""

    roles = {"text": Role("text")}
    metrics = ("perplexity", "loss", "accuracy")
    auto = "AutoModelForCausalLM"
    tag = "text-generation"
    headed = False
    smooths = True
    decodes = True
    writes = True

    def example_batch(self, model: nn.Module, batch: int, length: int, processor: Any = None) -> dict[str, Tensor]:
        inputs = self.inputs(model, batch, length, processor).kwargs
        return {**inputs, "labels": torch.zeros_like(inputs["input_ids"])}

    def tokens(self, batch: dict[str, list], index: list[int], reading: Reading) -> dict[str, Any]:
        """A text that is not cut ends with the end token, which is learnt too."""
        out, end = tokenised(batch, reading), reading.processor.eos_token_id
        for i, ids in enumerate(out["input_ids"]):
            if end is not None and 0 < len(ids) < reading.length and ids[-1] != end:
                for name in out.keys() & {"attention_mask", "token_type_ids"}:
                    out[name][i].append(out[name][i][-1])
                ids.append(end)
        out["labels"] = [[*ids[1:], IGNORED] for ids in out["input_ids"]]
        return out

    def padded_labels(self, labels: list[Any]) -> Tensor:
        return padded_lists(labels)

    def summary(self, out: Any, targets: Batch) -> Tensor:
        return likelihoods(out.logits, targets["labels"])

    def measure(self, metric: str, found: np.ndarray, rows: Any) -> float:
        return perplexity(metric, found)
