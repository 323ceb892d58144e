"""AdaLoRA: triplets of a low-rank term that compete for a budget of ranks over all sites. Ref. 37"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.algebra import Dense, Diag, Operator
from rewriter.methods.lora import INERT, PLAIN_START, constrained, scaled
from rewriter.transforms import (
    Alpha,
    Coefficient,
    Constraint,
    Interval,
    Member,
    Peft,
    Place,
    Pool,
    Rank,
    ScaleOf,
    Schedule,
    Scope,
    Share,
    Stored,
    TargetRank,
    normal,
    transform,
    transposed,
)

DECAY = 0.85


@dataclass(frozen=True)
class Prune(Schedule):
    """The least important triplets go, on a cubic schedule from `rank` to `target` as the mean of all matrices."""

    rank: int
    target: int
    start: float
    end: float
    interval: int

    def before_step(self, pool: Pool) -> None:
        """Follow the sensitivity |w dL/dw| and its uncertainty: moving averages."""
        for one in pool:
            for leaf in ("a", "d", "b"):
                weight = one[leaf]
                if weight.grad is None:
                    continue
                now = (weight.detach() * weight.grad).abs()
                mean, spread = (
                    one.state.setdefault(f"{leaf}.{name}", torch.zeros_like(now)).to(now.device)
                    for name in ("mean", "spread")
                )
                mean = DECAY * mean + (1 - DECAY) * now
                one.state[f"{leaf}.mean"] = mean
                one.state[f"{leaf}.spread"] = DECAY * spread + (1 - DECAY) * (now - mean).abs()

    def after_step(self, pool: Pool, step: int, steps: int) -> None:
        last = steps - round(self.end * steps)
        if step <= last and (step == last or step % self.interval == 0):
            kept = self.ranks(step, steps, sum(one.matrices for one in pool))
            scores = torch.cat([_importance(one).flatten() for one in pool])
            mask = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
            mask[scores.topk(min(kept, len(scores))).indices] = True
            for one, part in zip(pool, mask.split([one["d"].numel() for one in pool]), strict=True):
                one.state["kept"] = part.view_as(one["d"])
        elif step <= last:
            return
        pool.hold("d", "kept")

    def ranks(self, step: int, steps: int, matrices: int) -> int:
        """The sum of the ranks of so many matrices that the schedule leaves at a step. Ref. 37, (12)"""
        first, final = self.rank * matrices, self.target * matrices
        start, end = round(self.start * steps), steps - round(self.end * steps)
        if step <= start and step < end:
            return first
        left = max(0.0, 1 - (step - start) / max(1, end - start))
        return round(final + (first - final) * left**3)

    def settle(self, pool: Pool) -> None:
        """Only the kept triplets are left; those of a batch of matrices stay, since they have one shape."""
        for one in pool:
            kept = one.state.get("kept")
            if kept is None or kept.ndim > 1:
                continue
            for leaf, dim in (("a", -1), ("d", -1), ("b", -2)):
                keep = kept.to(one[leaf].device).nonzero().squeeze(-1)
                one.values[leaf] = one[leaf].detach().index_select(dim, keep)
            one.sizes["rank"] = int(kept.sum())


def _importance(one: Member) -> Tensor:
    """Of each triplet: its d's and the means over its column of A and its row of B."""
    a, d, b = (one.state[f"{leaf}.mean"] * one.state[f"{leaf}.spread"] for leaf in ("a", "d", "b"))
    return d + a.mean(-2) + b.mean(-1)


_ADDED = 1e-5  # to the rank, in PEFT


def _ours(value: Tensor, at: Place) -> Tensor:
    """PEFT divides by the rank that it began with."""
    return value.reshape(-1) * (at.options.rank / (at.options.rank + _ADDED))


def _theirs(value: Tensor, at: Place) -> Tensor:
    options = at.options
    alpha = options.alpha or options.rank
    scale = at.values["s"].item() if "s" in at.values else scaled(None, options.rank, alpha, options.scale)
    return (value * (scale / alpha * (options.rank + _ADDED))).unsqueeze(-1)


def _read(config: Mapping, tensors: Mapping) -> dict[str, int]:
    if len(tensors["a"]) > config["init_r"]:
        raise ValueError(f"init_r: {config['init_r']} is less than the {len(tensors['a'])} triplets of lora_A")
    return dict.fromkeys(("rank", "target_rank"), config["init_r"])


def _peft(options) -> dict[str, int | float]:
    if options.mpc == "n":
        raise ValueError("PEFT has no nonlinearity between the factors")
    steps = {"tinit": 0, "tfinal": 0, "total_step": 1}
    return {"lora_alpha": options.alpha or options.rank, "init_r": options.rank, "target_r": options.rank, **steps}


@transform(
    "extension",
    peft=Peft(
        "ADALORA",
        {"a": transposed("lora_A"), "b": transposed("lora_B"), "d": Stored("lora_E", _ours, _theirs)},
        {"alpha": "lora_alpha"},
        read=_read,
        sizes=lambda tensors: {"rank": len(tensors["a"])},
        write=_peft,
        fixed=PLAIN_START,
        ignored=INERT
        | {
            "r",
            "init_r",
            "target_r",
            "tinit",
            "tfinal",
            "deltaT",
            "beta1",
            "beta2",
            "orth_reg_weight",
            "total_step",
            "rank_pattern",
            "lora_dropout",
        },
        biases="lora_only",
        patterns={"lora_alpha": "alpha_pattern"},
        by_module=lambda values, options: (
            "rank_pattern",
            "lora_E",
            [i < len(values["d"]) for i in range(options.rank)],
        ),
    ),
)
def adalora(
    w: Operator,
    site: Scope,
    *,
    rank: Rank,
    target_rank: TargetRank = None,
    alpha: Alpha = None,
    scale: ScaleOf = "fixed",
    mpc: Constraint = "o",
    coefficient: Coefficient = 1e-3,
    start: Share = 0.1,
    end: Share = 0.3,
    interval: Interval = 10,
) -> Operator:
    """W + s A Diag(d) B, orthogonality penalty, d = 0 at the start; the least important triplets are pruned. Ref. 37

    The mean rank falls on a cubic schedule from `rank` to `target_rank` (two thirds of it by default), after the first
    `start` of the steps and until the last `end` of them, every `interval` steps, over all sites together.
    """
    kept = site.size("rank", -1)
    if kept < 0:
        kept, target = rank, target_rank or math.ceil(2 * rank / 3)
        site.schedule(Prune(rank, target, start, end, interval))
    a = Dense(site.tuned("a", (site.n, kept), normal(site.n**-0.5)))
    b = Dense(site.tuned("b", (kept, site.m), normal(site.m**-0.5)))
    d = Diag(site.tuned("d", kept, 0.0))
    return w + scaled(site, rank, alpha, scale) * (constrained(site, a, b, mpc, coefficient) @ d @ b)
