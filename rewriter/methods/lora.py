"""A low-rank term beside the weight, (15): LoRA and its kin."""

import math
from collections.abc import Mapping

from torch import Tensor

from rewriter.algebra import Dense, Diag, Dropout, Operator, Pointwise
from rewriter.transforms import (
    RANKS,
    Alpha,
    Coefficient,
    Constraint,
    Peft,
    Place,
    Probability,
    Rank,
    Ratio,
    ScaleOf,
    Scope,
    Stored,
    eye,
    kaiming_uniform,
    transform,
    transposed,
)


def scaled(site: Scope, rank: int, alpha: float | None, scale: str = "fixed") -> float | Tensor:
    """s of (15): alpha / rank, alpha / sqrt(rank) (arXiv 2312.03732), or a tuned scalar that starts at alpha / rank."""
    alpha = alpha or rank
    if scale == "learned":
        return site.tuned("s", (1, 1), alpha / rank)
    return alpha / (math.sqrt(rank) if scale == "rslora" else rank)


def constrained(site: Scope, a: Dense, b: Dense, mpc: str | None, coefficient: float) -> Operator:
    """A under a matrix pattern constraint: then h (n), or as it is, with the penalty of (25) or (26) on A and B."""
    if mpc == "n":
        return a @ Pointwise("relu")
    if mpc:
        left, right = a.stored.transpose(-2, -1) @ a.stored, b.stored @ b.stored.transpose(-2, -1)
        value = _off_diagonal(left) + _diagonal(left) + _off_diagonal(right)
        site.penalty(f"mpc_{mpc}", coefficient * (value + _diagonal(right) if mpc == "o" else value))
    return a


def _off_diagonal(gram: Tensor) -> Tensor:
    return gram.square().sum() - gram.diagonal(0, -2, -1).square().sum()


def _diagonal(gram: Tensor) -> Tensor:
    return (gram.diagonal(0, -2, -1) - 1).square().sum()


# PEFT starts from other base weights with these, and gives the change of them alone.
PLAIN_START = {"init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}
INERT = frozenset({
    "use_dora", "use_rslora", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "megatron_config", "megatron_core", "qalora_group_size",
})  # fmt: skip


def _a(value: Tensor, at: Place) -> Tensor:
    """Of experts (b, n, r) from (b r, n)."""
    return value.mT if at.batch is None else value.reshape(at.batch, -1, value.shape[-1]).mT


def _their_a(value: Tensor, at: Place) -> Tensor:
    return value.mT if at.batch is None else value.mT.flatten(0, 1)


def _b(value: Tensor, at: Place) -> Tensor:
    """Of experts (b, r, m) from (m, r b)."""
    return value.mT if at.batch is None else value.reshape(value.shape[0], -1, at.batch).permute(2, 1, 0)


def _their_b(value: Tensor, at: Place) -> Tensor:
    value = value * at.values["s"] if "s" in at.values else value
    return value.mT if at.batch is None else value.permute(2, 1, 0).flatten(1, 2)


def _of_experts(tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> bool:
    a, b = tensors["a"].shape, tensors["b"].shape
    return a[0] == b[1] and a[0] % shape[0] == 0 and {a[1], b[0]} == set(shape[1:])


def _peft(options) -> dict[str, bool | float]:
    if options.mpc == "n":
        raise ValueError("PEFT has no nonlinearity between the factors")
    if options.scale == "learned":  # It is in B.
        return {"lora_alpha": options.rank}
    return {"use_rslora": options.scale == "rslora", "lora_alpha": options.alpha or options.rank}


@transform(
    "extension",
    peft=Peft(
        "LORA",
        {"a": Stored("lora_A.weight", _a, _their_a), "b": Stored("lora_B.weight", _b, _their_b)},
        {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
        fits=lambda config, tensors: not config.get("use_dora") and config.get("init_lora_weights") != "pissa",
        read=lambda config, _: {"scale": "rslora" if config.get("use_rslora") else "fixed"},
        write=_peft,
        fixed=PLAIN_START,
        ignored=INERT,
        biases="lora_only",
        patterns=RANKS,
        factors=("a", "b"),
        batched=_of_experts,
        tables={"a": transposed("lora_embedding_A"), "b": transposed("lora_embedding_B")},
    ),
)
def lora(
    w: Operator,
    site: Scope,
    *,
    rank: Rank,
    alpha: Alpha = None,
    scale: ScaleOf = "fixed",
    dropout: Probability = 0.0,
    ratio: Ratio = 1.0,
    mpc: Constraint = None,
    coefficient: Coefficient = 1e-3,
) -> Operator:
    """W + s A B; A Kaiming-uniform and B = 0 at the start. (21)"""
    a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
    b = Dense(site.tuned("b", (rank, site.m), 0.0, ratio))
    product = constrained(site, a, b, mpc, coefficient) @ b
    return w + scaled(site, rank, alpha, scale) * (Dropout(dropout, site.n) @ product if dropout else product)


@transform("extension")
def trilora(
    w: Operator,
    site: Scope,
    *,
    rank: Rank,
    alpha: Alpha = None,
    scale: ScaleOf = "fixed",
    mpc: Constraint = None,
    coefficient: Coefficient = 1e-3,
) -> Operator:
    """W + s A Diag(d) B; A Kaiming-uniform, d = 1 and B = 0 at the start. Ref. 70"""
    a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
    b = Dense(site.tuned("b", (rank, site.m), 0.0))
    d = Diag(site.tuned("d", rank, 1.0))
    return w + scaled(site, rank, alpha, scale) * (constrained(site, a, b, mpc, coefficient) @ d @ b)


@transform("extension")
def flora(
    w: Operator,
    site: Scope,
    *,
    rank: Rank,
    alpha: Alpha = None,
    scale: ScaleOf = "fixed",
    mpc: Constraint = None,
    coefficient: Coefficient = 1e-3,
) -> Operator:
    """W + s A M B, M (rank, rank); A Kaiming-uniform, M = I and B = 0 at the start. Ref. 38"""
    a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
    b = Dense(site.tuned("b", (rank, site.m), 0.0))
    m = Dense(site.tuned("m", (rank, rank), eye))
    return w + scaled(site, rank, alpha, scale) * (constrained(site, a, b, mpc, coefficient) @ m @ b)
