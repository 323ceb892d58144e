"""A vector for a text, near to those of texts that mean the same."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, FiniteFloat, field_validator
from torch import Tensor, nn

from ..errors import SpecError
from .base import (
    PLAIN,
    WHOLE,
    Batch,
    Collate,
    Criterion,
    Options,
    Reading,
    Role,
    Task,
    cut_off,
    padded,
)
from .cells import check_cells, number, words
from .measures import correlation

SCALE = 20.0  # of the cosines among which the right pair is told, as sentence-transformers' ranking loss has it
DEPTHS = (1, 5, 10)
OUTPUT = "sentence_embedding"
POOLING = "1_Pooling/config.json"
# A mode as sentence-transformers writes it -> this task's, None where it has no such.
MODES = {
    "mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls",
    "max_tokens": None, "max": None, "mean_sqrt_len_tokens": None, "weightedmean_tokens": None, "lasttoken": None,
}  # fmt: skip
_MODULES = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]


class EmbeddingOptions(Options):
    """How token vectors become one, and what scores mean."""

    pooling: Literal["mean", "cls"] | None = Field(
        None, description="mean of the tokens, or the first one; default: what the model's 1_Pooling says, else mean"
    )
    scores: list[FiniteFloat] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="scores of no and of complete likeness, e.g. [0.0, 5.0], read as 0 to 1",
    )

    @field_validator("scores")
    @classmethod
    def _apart(cls, scores: list[float] | None) -> list[float] | None:
        if scores and scores[0] == scores[1]:
            raise ValueError("the scores of no and of complete likeness must differ")
        return scores


class SentenceEmbedding(Task):
    """Pairs of texts with a score: mean squared error of their cosine, or pairs alone: each first text has to find its
    second one among those of the batch (cross entropy of the cosines, times 20). Embeddings have length 1."""

    Options = EmbeddingOptions
    roles = {"text": Role("text"), "text_pair": Role("text"), "score": Role("number", False)}
    ranks = tuple(f"recall@{k}" for k in DEPTHS)
    metrics = ("spearman", *ranks, "loss")
    auto = "AutoModel"
    tag = "sentence-similarity"
    headed = False

    def metrics_of(self, columns: Mapping[str, str]) -> tuple[str, ...]:
        return ("spearman", "loss") if "score" in columns else (*self.ranks, "loss")

    def least(self, columns: Mapping[str, str]) -> int:
        return 1 if "score" in columns else 2

    def module(self, model: nn.Module, revision: str | None = None) -> nn.Module:
        return Embedder(model, self.options.pooling or _written_pooling(model.config.name_or_path, revision))

    def example_batch(self, model: nn.Module, batch: int, length: int, processor: Any = None) -> dict[str, Tensor]:
        inputs = self.inputs(model, 2 * batch, length, processor).kwargs
        return {**inputs, "labels": torch.arange(batch, device=next(model.parameters()).device)}

    def check(self, rows: Any, columns: Mapping[str, str], labels: Sequence[str]) -> None:
        if "score" in columns:
            low, high = self.options.scores or (-1.0, 1.0)
            wanted = f"a number from {low:g} to {high:g}"
            if self.options.scores is None:
                wanted += "; other scores need model.task_options, e.g. {scores: [0.0, 5.0]}"
            check_cells(rows, columns, "score", self._score, wanted)

    def _score(self, value: Any) -> float:
        found, (low, high) = number(value), self.options.scores or (-1.0, 1.0)
        if not min(low, high) <= found <= max(low, high):
            raise ValueError(value)
        return found if self.options.scores is None else (found - low) / (high - low)

    def tokens(self, batch: dict[str, list], index: list[int], reading: Reading) -> dict[str, Any]:
        columns = reading.columns
        found = {role: cut_off(reading, words(batch[columns[role]])) for role in ("text", "text_pair")}
        whole = [max(both) for both in zip(*(one.pop(WHOLE) for one in found.values()), strict=True)]
        out = {f"{role}_{name}": value for role, one in found.items() for name, value in one.items()} | {WHOLE: whole}
        if "score" in columns:
            out["score"] = [self._score(value) for value in batch[columns["score"]]]
        return out

    def learnt(self, row: Mapping[str, Any]) -> int:
        return all(len(row[f"{role}_input_ids"]) > 0 for role in ("text", "text_pair"))

    def length(self, row: Mapping[str, Any]) -> int:
        return max(len(row["text_input_ids"]), len(row["text_pair_input_ids"]))

    def collator(self, processor: Any, input_names: Sequence[str], start: int | None) -> Collate:
        """Of n pairs: 2 n sequences, the first texts before the second ones; `score`, or `labels`, the place of each
        first text's second one; (n,)."""

        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            names = ("input_ids", "attention_mask", "token_type_ids")
            texts = [
                {name: row[f"{role}_{name}"] for name in names if f"{role}_{name}" in row}
                for role in ("text", "text_pair")
                for row in rows
            ]
            batch = padded(processor, texts)
            inputs = {name: batch[name] for name in input_names}
            if "score" in rows[0]:
                return {**inputs, "score": torch.tensor([row["score"] for row in rows])}
            return {**inputs, "labels": torch.arange(len(rows))}

        return collate

    def count(self, targets: Batch, criterion: Criterion = PLAIN) -> Tensor:
        (one,) = targets.values()
        return torch.tensor(len(one), device=one.device)

    def loss(self, out: Any, targets: Batch, criterion: Criterion = PLAIN) -> Tensor:
        """The sum over pairs, of embeddings (2 pairs, size)."""
        vectors = out[OUTPUT]
        first, second = vectors.to(torch.promote_types(vectors.dtype, torch.float32)).chunk(2)
        if "score" in targets:
            return F.mse_loss((first * second).sum(1), targets["score"].to(first.dtype), reduction="sum")
        return F.cross_entropy(SCALE * first @ second.T, targets["labels"], reduction="sum")

    def summary(self, out: Any, targets: Batch) -> Tensor:
        """(pairs, 2 size + 1): the first and the second vector, and the score or the label."""
        (one,) = targets.values()
        first, second = out[OUTPUT].float().chunk(2)
        return torch.cat([first, second, one.float().unsqueeze(1)], dim=1)

    def measure(self, metric: str, found: np.ndarray, rows: Any) -> float:
        first, second = np.split(found[:, :-1], 2, axis=1)
        if metric == "spearman":
            return correlation((first * second).sum(1), found[:, -1], ranks=True)
        k, right = int(metric.removeprefix("recall@")), (first * second).sum(1)
        # A text that stands in several pairs is as near in each: only what is nearer counts against a pair.
        before = [(row @ second.T > own + 1e-6).sum() for row, own in zip(first, right, strict=True)]
        return float(np.mean([count < k for count in before]))

    def draws(self, metric: str) -> bool:
        """A text is looked for among all others."""
        return metric == "spearman"

    def blank(self, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        return {"text_pair": row.get("text_pair", row["text"])}

    def answer(self, out: Any, targets: Batch, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        """The text's embedding; of a pair, how near the two are: the cosine."""
        first, second = out[OUTPUT].double()
        return {"cosine": (first @ second).item()} if "text_pair" in row else {"embedding": first.tolist()}

    def metadata(self, labels: Sequence[str]) -> dict[str, Any]:
        return {"normalized": True}

    def ship(self, folder: Path, model: nn.Module, max_length: int) -> None:
        """The files by which sentence-transformers loads the folder: modules.json and one for each module."""
        kind = "sentence_transformers.models"
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"{kind}.{name}"}
            for i, (path, name) in enumerate(_MODULES)
        ]
        size = model.config.hidden_size
        modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
        pooling = {f"pooling_mode_{mode}": MODES[mode] == model.pooling for mode in modes}
        files = {
            "modules.json": modules,
            POOLING: {"word_embedding_dimension": size, **pooling},
            "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
            "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
        }
        for path, _ in _MODULES[1:]:
            (folder / path).mkdir()
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class Embedder(nn.Module):
    """A text model whose token vectors are pooled and normalised. Its parameters have the text model's names.

    Args:
        base: a model of transformers whose output has `last_hidden_state`, (batch, sequence, size).
        pooling: mean or cls.
    """

    def __init__(self, base: nn.Module, pooling: str):
        super().__init__()
        self._base = (base,)  # In a tuple, so that it is no submodule.
        self.config, self.pooling = base.config, pooling
        for name, child in base.named_children():
            self.add_module(name, child)
        for name, parameter in base.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def train(self, mode: bool = True) -> "Embedder":
        self._base[0].train(mode)
        return super().train(mode)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Embeddings (batch, size) of length 1, and what they are pooled of, (batch, sequence, size): some consumers
        pool themselves."""
        more = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        tokens = self._base[0](input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        if self.pooling == "cls":
            first = attention_mask.int().argmax(dim=1)  # ONNX Runtime has no argmax of 64-bit integers.
            pooled = tokens[torch.arange(tokens.shape[0], device=tokens.device), first]
        else:
            pooled = (tokens * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return {OUTPUT: F.normalize(pooled, dim=1), "last_hidden_state": tokens}


def _written_pooling(name: str, revision: str | None) -> str:
    """What a sentence-transformers model says of its pooling; `mean` where it says nothing.

    Raises:
        SpecError: it is none of this task's, or it can't be read.
    """
    written = _pooling_file(name, revision)
    if written is None:
        return "mean"
    marked = (key.removeprefix("pooling_mode_") for key, on in written.items() if on is True)
    modes = [mode for mode in marked if mode in MODES] or [str(written.get("pooling_mode"))]
    if len(modes) != 1 or MODES.get(modes[0]) is None:
        said = f"{name} pools by {', '.join(modes)}, which is not mean or cls"
        raise SpecError(f"{said}; set pooling in model.task_options to use one of them instead", ("model", "name"))
    return MODES[modes[0]]


def _pooling_file(name: str, revision: str | None) -> dict[str, Any] | None:
    """The content of a model's 1_Pooling/config.json; None where it has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if not name or Path(name).is_dir():
        file = Path(name) / POOLING if name else None
    else:
        try:
            file = Path(hf_hub_download(name, POOLING, revision=revision))
        except LocalEntryNotFoundError:
            raise SpecError(
                f"can't reach {name} to see how it pools; set pooling in model.task_options: mean or cls",
                ("model", "name"),
            ) from None
        except EntryNotFoundError:
            file = None
    return json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else None
