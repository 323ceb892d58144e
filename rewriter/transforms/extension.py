"""Extension, phi(W) = W + s dW: a tuned term is added to W. Equations of arXiv 2407.05417v2, (15)."""

import math

from ..algebra import Affine, Dense, Diag, Dropout, Identity, Operator, Pointwise, Value
from . import (
    Activation,
    Alpha,
    Coefficient,
    Constraint,
    Interval,
    Probability,
    Rank,
    ScaleOf,
    Scope,
    Share,
    TargetRank,
    Width,
    eye,
    kaiming_uniform,
    normal,
    transform,
)


def scaled(site: Scope, rank: int, alpha: float | None, scale: str) -> float | Value:
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


def _off_diagonal(gram: Value) -> Value:
    return gram.square().sum() - gram.diagonal(0, -2, -1).square().sum()


def _diagonal(gram: Value) -> Value:
    return (gram.diagonal(0, -2, -1) - 1).square().sum()


@transform
def lora(
    w: Operator,
    site: Scope,
    *,
    rank: Rank,
    alpha: Alpha = None,
    scale: ScaleOf = "fixed",
    dropout: Probability = 0.0,
    mpc: Constraint = None,
    coefficient: Coefficient = 1e-3,
) -> Operator:
    """W + s A B; A Kaiming-uniform and B = 0 at the start. (21)"""
    a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
    b = Dense(site.tuned("b", (rank, site.m), 0.0))
    product = constrained(site, a, b, mpc, coefficient) @ b
    return w + scaled(site, rank, alpha, scale) * (Dropout(dropout, site.n) @ product if dropout else product)


@transform
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


@transform
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
    kept = site.size("rank", rank)
    a = Dense(site.tuned("a", (site.n, kept), normal(site.n**-0.5)))
    b = Dense(site.tuned("b", (kept, site.m), normal(site.m**-0.5)))
    d = Diag(site.tuned("d", kept, 0.0))
    return w + scaled(site, rank, alpha, scale) * (constrained(site, a, b, mpc, coefficient) @ d @ b)


@transform
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


@transform(on=("attention", "feed_forward"))
def hadapter(w: Operator, site: Scope, *, bottleneck: Width, activation: Activation = "relu") -> Operator:
    """y + h(yA + a)B + b on the outputs y of attention and feed-forward, inside the residual; B = 0. (27), ref. 22"""
    down = Affine(Dense(site.tuned("a", (site.m, bottleneck), kaiming_uniform)), site.tuned("a_bias", bottleneck, 0.0))
    up = Affine(Dense(site.tuned("b", (bottleneck, site.m), 0.0)), site.tuned("b_bias", site.m, 0.0))
    return w @ (Identity() + down @ Pointwise(activation) @ up)


@transform(on=("feed_forward",))
def padapter(w: Operator, site: Scope, *, bottleneck: Width, activation: Activation = "relu") -> Operator:
    """y + h(yA + a)B + b on the output y of the feed-forward alone; B = 0 at the start. (27), ref. 72"""
    return hadapter(w, site, bottleneck=bottleneck, activation=activation)


@transform(on=("matrix", "feed_forward"))
def pa(
    w: Operator,
    site: Scope,
    *,
    rank: Rank,
    alpha: Alpha = None,
    scale: ScaleOf = "fixed",
    activation: Activation = "relu",
) -> Operator:
    """xW + s h(xA)B, beside a weight or a whole feed-forward; A Kaiming-uniform and B = 0. (30)(31), ref. 18"""
    a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
    b = Dense(site.tuned("b", (rank, site.m), 0.0))
    return w + scaled(site, rank, alpha, scale) * (a @ Pointwise(activation) @ b)


def best_scale(w: Value, target: Value, change: Value) -> Value:
    """The s that minimises norm(W* - W - s dW)^2, a scalar: <W* - W, dW> / norm(dW)^2. (20)

    Args:
        w, target, change: W, W* and dW, of one shape.
    """
    return ((target - w) * change).sum() / change.square().sum()
