"""A text from a text, by an encoder and a decoder."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import SpecError
from ..graph.traced import Inputs
from .base import (
    IGNORED,
    WRITTEN,
    Batch,
    Collate,
    Question,
    Reading,
    Role,
    Task,
    padded,
    padded_lists,
    token_inputs,
    tokenised,
)
from .cells import words
from .measures import likelihoods, perplexity


class Seq2SeqLM(Task):
    """Cross entropy of the label's tokens; the decoder reads them one position later."""

    roles = {"text": Role("text"), "label": Role("text")}
    metrics = ("perplexity", "loss", "accuracy", *WRITTEN)
    auto = "AutoModelForSeq2SeqLM"
    tag = "text2text-generation"
    headed = False
    smooths = True
    writes = True
    defers = True

    def replies(self, columns: Mapping[str, str]) -> bool:
        return "label" in columns

    def question(self, row: Mapping[str, Any], reading: Reading) -> Question | None:
        text, answer = (str(row[reading.columns[role]]) for role in ("text", "label"))
        ids = reading.processor(text, truncation=True, max_length=reading.length)["input_ids"]
        return Question(list(ids), answer) if ids and answer.strip() else None

    def inputs(self, model: nn.Module, batch: int = 3, length: int = 11, processor: Any = None) -> Inputs:
        """A decoder's sequence is shorter, so that no two sizes are equal."""
        if getattr(model.config, "decoder_start_token_id", None) is None:
            said = "its config has no decoder_start_token_id: what a decoder's text starts with is not known"
            raise SpecError(said, ("model", "name"))
        decoder = length - 4 if length > 8 else length + 1
        lengths = {"input_ids": length, "attention_mask": length, "decoder_input_ids": decoder}
        return token_inputs(model, lengths, batch)

    def example_batch(self, model: nn.Module, batch: int, length: int, processor: Any = None) -> dict[str, Tensor]:
        inputs = self.inputs(model, batch, length, processor).kwargs
        decoder = inputs["input_ids"].clone()
        return {**inputs, "decoder_input_ids": decoder, "labels": torch.zeros_like(decoder)}

    def tokens(self, batch: dict[str, list], index: list[int], reading: Reading) -> dict[str, Any]:
        out, label = tokenised(batch, reading), reading.columns["label"]
        options = {"truncation": True, "max_length": reading.length}
        out["labels"] = reading.processor(text_target=words(batch[label]), **options)["input_ids"]
        return out

    def collator(self, processor: Any, input_names: Sequence[str], start: int | None) -> Collate:
        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            batch = padded(processor, rows)
            batch["labels"] = padded_lists([row["labels"] for row in rows])
            shifted = batch["labels"].roll(1, dims=1)
            shifted[:, 0] = start
            batch["decoder_input_ids"] = shifted.masked_fill(shifted == IGNORED, processor.pad_token_id)
            return {name: batch[name] for name in (*input_names, "labels")}

        return collate

    def summary(self, out: Any, targets: Batch) -> Tensor:
        return likelihoods(out.logits, targets["labels"])

    def summed(self, summary: Tensor) -> Tensor:
        return summary[:, :2].sum(0)

    def measure(self, metric: str, found: np.ndarray, rows: Any) -> float:
        return perplexity(metric, found)
