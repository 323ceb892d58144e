"""Which of two answers is the better one: direct preference optimisation, and odds ratios without a reference."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..errors import SpecError
from ..graph.deferred import Deferred
from .base import (
    IGNORED,
    PLAIN,
    WHOLE,
    Batch,
    Collate,
    Criterion,
    Options,
    Reading,
    Role,
    Task,
    padded,
    padded_lists,
)
from .chat import asked
from .measures import likelihoods
from .texts import chats, completions, endings, labelled, opening, turns_in

SIDES = ("chosen", "rejected")
_REFERENCE = tuple(f"{side}_reference" for side in SIDES)


class PreferenceOptions(Options):
    """What is learnt of a pair."""

    loss: Literal["dpo", "orpo"] = Field(
        "dpo", description="dpo: beside the model before it is tuned; orpo: without a reference"
    )
    beta: float = Field(0.1, gt=0, le=1000, description="how much a difference of the two counts")


class Preference(Task):
    """Pairs of answers to a prompt, of which one is the better.

    `dpo`: -log sigmoid(beta (r(chosen) - r(rejected))) with r the log-probability of an answer less that of the model
    before it is tuned (Rafailov et al., arXiv 2305.18290, eq. 7), `label_smoothing` the share of pairs that are the
    other way round. `orpo`: the chosen answer's mean negative log-likelihood, less beta log sigmoid of the log odds
    ratio of the mean likelihoods (Hong et al., arXiv 2403.07691, eqs. 6 and 7).
    """

    Options = PreferenceOptions
    roles = {
        "prompt": Role("text", False), "messages": Role("messages", False),
        "chosen": Role("text"), "rejected": Role("text"),
    }  # fmt: skip
    ways = (("prompt", *SIDES), SIDES, ("messages", *SIDES))
    metrics = ("accuracy", "margin", "loss")
    auto = "AutoModelForCausalLM"
    tag = "text-generation"
    headed = False
    decodes = True
    writes = True
    defers = True

    @property
    def smooths(self) -> bool:
        return self.options.loss == "dpo"

    @property
    def reference(self) -> tuple[str, ...]:
        """The log-probability of each answer."""
        return _REFERENCE if self.options.loss == "dpo" else ()

    def kind(self, role: str, columns: Mapping[str, str]) -> str:
        """Answers to a prompt are texts; else they are turns: those that follow `messages`, or a whole chat."""
        return "messages" if role in SIDES and "prompt" not in columns else self.roles[role].kind

    def useless(self, key: str, value: Any, columns: Mapping[str, str]) -> str | None:
        if key == "loss":
            return "the answers are what is learnt"
        if key == "long":
            return "a pair is not split" if value == "split" else None
        return "it is for turns" if "prompt" in columns else None

    def asks_of(self, columns: Mapping[str, str]) -> tuple[str, ...]:
        return next((way[:1] for way in self.ways if set(way) == set(columns)), ("prompt",))

    def ends(self, columns: Mapping[str, str], processor: Any) -> list[int]:
        return endings(processor, "prompt" not in columns)

    def starts(self, row: Mapping[str, Any], processor: Any) -> list[int]:
        """Turns as the template renders them where the assistant is to answer."""
        turns = row.get("messages", row.get("chosen"))
        if turns is not None:
            return asked(processor, turns, None)
        return opening(row["prompt"], processor, True)

    def example_batch(self, model: nn.Module, batch: int, length: int, processor: Any = None) -> dict[str, Tensor]:
        inputs = self.inputs(model, 2 * batch, length, processor).kwargs
        labels = torch.zeros_like(inputs["input_ids"])
        return {**inputs, "labels": labels} | ({"reference": labels[:, 0].double()} if self.reference else {})

    def tokens(self, batch: dict[str, list], index: list[int], reading: Reading) -> dict[str, Any]:
        """Both answers, each with what is asked before it; labels are shifted, and those of the answer alone."""
        out: dict[str, Any] = {}
        for side, found in zip(SIDES, _read(batch, index, reading), strict=True):
            for number, (ids, learnt) in zip(index, found, strict=True):
                if len(ids) > reading.length and reading.long == "refuse":
                    said = f"a pair has an answer that ends at token {len(ids)}{reading.named([number])}"
                    raise SpecError(f"{said}; data.long: truncate takes it", ("data", "max_length"))
                kept = labelled(ids, learnt)[: reading.length]
                # Cut, the last token has no next one that is read.
                kept = [*kept[:-1], IGNORED] if len(ids) > reading.length else kept
                out.setdefault(f"{side}_input_ids", []).append(ids[: reading.length])
                out.setdefault(f"{side}_labels", []).append(kept)
                out.setdefault(f"{side}_{WHOLE}", []).append(len(ids))
        for place, ids in enumerate(out["chosen_input_ids"]):
            if ids == out["rejected_input_ids"][place]:  # Nothing tells the two apart.
                out["chosen_labels"][place] = [IGNORED] * len(ids)
        both = zip(*(out.pop(f"{side}_{WHOLE}") for side in SIDES), strict=True)
        return out | {WHOLE: [max(pair) for pair in both]}

    def learnt(self, row: Mapping[str, Any]) -> int:
        return min(sum(one != IGNORED for one in row[f"{side}_labels"]) for side in SIDES)

    def length(self, row: Mapping[str, Any]) -> int:
        return max(len(row[f"{side}_input_ids"]) for side in SIDES)

    def parts(self, row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        return {side: {name: row[f"{side}_{name}"] for name in ("input_ids", "labels")} for side in SIDES}

    def marks(self, row: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> list[bool]:
        return [False, *(one != IGNORED for one in row["labels"][:-1])]

    def collator(self, processor: Any, input_names: Sequence[str], start: int | None) -> Collate:
        """Of n pairs: 2 n sequences, the chosen ones before the rejected ones; `labels` (2 n, sequence), and
        `reference` (2 n,), float64, where the rows have it."""

        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            ids = [row[f"{side}_input_ids"] for side in SIDES for row in rows]
            batch = padded(processor, [{"input_ids": one, "attention_mask": [1] * len(one)} for one in ids])
            batch["labels"] = padded_lists([row[f"{side}_labels"] for side in SIDES for row in rows])
            found = {name: batch[name] for name in (*input_names, "labels")}
            if _REFERENCE[0] in rows[0]:
                given = [row[name] for name in _REFERENCE for row in rows]
                found["reference"] = torch.tensor(given, dtype=torch.float64)
            return found

        return collate

    def refers(self, out: Any, targets: Batch) -> Tensor:
        return _sums(out.logits, targets["labels"])[:, 0].view(2, -1).T

    def count(self, targets: Batch, criterion: Criterion = PLAIN) -> Tensor:
        return torch.tensor(len(targets["labels"]) // 2, device=targets["labels"].device)

    def loss(self, out: Any, targets: Batch, criterion: Criterion = PLAIN) -> Tensor:
        """The sum over pairs. Of logits that are not computed yet, the log-probabilities are taken first, then the
        gradient of the loss with respect to them decides what each token's counts."""
        logits, labels = out.logits, targets["labels"]
        if not isinstance(logits, Deferred) or not torch.is_grad_enabled():
            return self._pairs(_sums(logits, labels), targets, criterion)[1].sum()
        sums = _sums(logits, labels).detach().requires_grad_()
        value = self._pairs(sums, targets, criterion)[1].sum()
        slope = torch.autograd.grad(value, sums)[0][:, :1].expand_as(labels).flatten()
        flat = labels.flatten()
        places = torch.where(flat == IGNORED, IGNORED, torch.arange(len(flat), device=flat.device))

        def term(part: Tensor, at: Tensor) -> Tensor:
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            return -(F.cross_entropy(wide, flat[at], reduction="none") * slope[at].to(wide.dtype)).sum()

        linear = logits.summed(term, places, IGNORED)
        return value.detach() + (linear - linear.detach())

    def _pairs(self, sums: Tensor, targets: Batch, criterion: Criterion = PLAIN) -> tuple[Tensor, Tensor]:
        """Of each pair, by how much the chosen answer is ahead, and the loss.

        Args:
            sums: (2 n, 2) log-probability and number of tokens of each answer.
        """
        beta, eps = self.options.beta, criterion.smoothing
        if self.options.loss == "dpo":
            chosen, rejected = (sums[:, 0] - targets["reference"].to(sums)).chunk(2)
            margin = beta * (chosen - rejected)
            return margin, -(1 - eps) * F.logsigmoid(margin) - eps * F.logsigmoid(-margin)
        chosen, rejected = (sums[:, 0] / sums[:, 1].clamp(min=1)).chunk(2)
        odds = (chosen - rejected) - (_log_of_rest(chosen) - _log_of_rest(rejected))
        return beta * odds, -chosen - beta * F.logsigmoid(odds)

    def summary(self, out: Any, targets: Batch) -> Tensor:
        """(pairs, 2): by how much the chosen answer is ahead, and the loss."""
        return torch.stack(self._pairs(_sums(out.logits, targets["labels"]), targets), dim=1)

    def summed(self, summary: Tensor) -> Tensor:
        return torch.stack([summary[:, 1].sum(), summary.new_tensor(len(summary))])

    def measure(self, metric: str, found: np.ndarray, rows: Any) -> float:
        return float((found[:, 0] > 0).mean() if metric == "accuracy" else found[:, 0].mean())


def _sums(logits: Tensor | Deferred, labels: Tensor) -> Tensor:
    """(rows, 2), float64: the log-probability of a row's labels, and how many there are."""
    if not isinstance(logits, Deferred):
        wide = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
        each = F.cross_entropy(wide, labels.flatten(), ignore_index=IGNORED, reduction="none").double()
        return torch.stack([-each.view(labels.shape).sum(1), (labels != IGNORED).sum(1).double()], dim=1)
    if labels.is_meta:  # Which labels there are is not known.
        return torch.zeros(len(labels), 2, dtype=torch.float64, device="meta")
    found = likelihoods(logits, labels)
    return torch.stack([-found[:, 0], found[:, 1]], dim=1)


def _log_of_rest(logp: Tensor) -> Tensor:
    """log(1 - p) of log p < 0, exact near both ends."""
    near = logp > -math.log(2)
    small, large = torch.where(near, -1.0, logp), torch.where(near, logp, -1.0)
    return torch.where(near, torch.log(-torch.expm1(large)), torch.log1p(-torch.exp(small)))


def _read(batch: dict[str, list], index: list[int], reading: Reading) -> list[list[tuple[list[int], list[bool]]]]:
    """Of each side the tokens of every row, and which of them are its answer's."""
    columns = reading.columns
    if "prompt" in columns:
        prompts = batch[columns["prompt"]]
        return [completions(prompts, batch[columns[side]], reading) for side in SIDES]
    sides = [turns_in(batch[columns[side]], index, side, reading) for side in SIDES]
    if "messages" in columns:
        before = turns_in(batch[columns["messages"]], index, "messages", reading)
        sides = [[a + b for a, b in zip(before, answers, strict=True)] for answers in sides]
    else:
        before = [_shared(*pair) for pair in zip(*sides, strict=True)]
    prompts = [asked(reading.processor, turns, None) if turns else [] for turns in before]
    found = []
    for turns in sides:
        made = chats(turns, index, reading)
        for number, whole, first, prompt, (ids, learnt) in zip(index, turns, before, prompts, made, strict=True):
            if whole == first:  # It has no answer.
                learnt[:] = [False] * len(learnt)
                continue
            if ids[: len(prompt)] != prompt:
                said = "what its chat template renders where an answer is asked for is no start of the whole chat"
                said += f": which tokens are the answer's is not known{reading.named([number])}"
                raise SpecError(said, ("data", "template"))
            learnt[: len(prompt)] = [False] * len(prompt)
        found.append(made)
    return found


def _shared(one: Sequence[Any], other: Sequence[Any]) -> list[Any]:
    """The turns that two chats begin with alike."""
    count = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return list(one[:count])
