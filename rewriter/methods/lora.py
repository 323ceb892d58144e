"""A low-rank term beside the weight, (15): LoRA and its kin."""

import math

from torch import Tensor

from rewriter.algebra import Dense, Diag, Dropout, Operator, Pointwise
from rewriter.transforms import (
    Alpha,
    Coefficient,
    Constraint,
    Probability,
    Rank,
    Ratio,
    ScaleOf,
    Scope,
    eye,
    kaiming_uniform,
    transform,
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


@transform("extension")
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
