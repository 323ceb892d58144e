"""Extension, phi(W) = W + s dW: a tuned term is added to W. Equations of arXiv 2407.05417v2, (15)."""

import math

import torch

from ..algebra import Affine, Dense, Diag, Dropout, Hadamard, Identity, Kronecker, Operator, Pointwise, Value
from . import (
    Activation,
    Alpha,
    Coefficient,
    Constraint,
    Factor,
    Interval,
    Positive,
    Probability,
    Rank,
    Ratio,
    ScaleOf,
    Scope,
    Share,
    TargetRank,
    Width,
    eye,
    he_uniform,
    kaiming_uniform,
    normal,
    transform,
)


def scaled(site: Scope, rank: int, alpha: float | None, scale: str = "fixed") -> float | Value:
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
    ratio: Ratio = 1.0,
    mpc: Constraint = None,
    coefficient: Coefficient = 1e-3,
) -> Operator:
    """W + s A B; A Kaiming-uniform and B = 0 at the start. (21)"""
    a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
    b = Dense(site.tuned("b", (rank, site.m), 0.0, ratio))
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


@transform
def pissa(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """W - A0 B0 + A B; A = A0 = Ur Sr^(1/2), B = B0 = Sr^(1/2) Vr^t, the largest singular values. arXiv 2404.02948"""
    return _replaced(w, site, slice(0, rank))


@transform
def milora(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """As `pissa`, of the smallest singular values. arXiv 2406.09044"""
    k = min(site.n, site.m)
    return _replaced(w, site, slice(k - rank, k))


def _replaced(w: Operator, site: Scope, part: slice) -> Operator:
    u, s, vt = site.svd()
    root, rank = s[..., part].sqrt(), part.stop - part.start
    a0, b0 = u[..., part] * root.unsqueeze(-2), root.unsqueeze(-1) * vt[..., part, :]
    a, b = site.tuned("a", (site.n, rank), a0), site.tuned("b", (rank, site.m), b0)
    return w - Dense(a0) @ Dense(b0) + Dense(a) @ Dense(b)


@transform
def lora_fa(w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None, scale: ScaleOf = "fixed") -> Operator:
    """W + s A B, A random and frozen, B = 0 at the start. arXiv 2308.03303"""
    a = Dense(site.frozen("a", (site.n, rank), kaiming_uniform))
    return w + scaled(site, rank, alpha, scale) * (a @ Dense(site.tuned("b", (rank, site.m), 0.0)))


@transform
def lora_xs(w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None, scale: ScaleOf = "fixed") -> Operator:
    """W + s (Ur Sr) R Vr^t, R (r, r) = 0 at the start. arXiv 2405.17604"""
    u, s, vt = site.svd()
    r = Dense(site.tuned("r", (rank, rank), 0.0))
    change = Dense(u[..., :rank]) @ Diag(s[..., :rank]) @ r @ Dense(vt[..., :rank, :])
    return w + scaled(site, rank, alpha, scale) * change


@transform
def vera(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """W + A Diag(d) B Diag(l), A and B random, frozen and the same everywhere; d = 0.1, l = 0. arXiv 2310.11454"""
    a = Dense(site.frozen("a", (site.n, rank), he_uniform))
    b = Dense(site.frozen("b", (rank, site.m), he_uniform))
    return w + a @ Diag(site.tuned("d", rank, 0.1)) @ b @ Diag(site.tuned("l", site.m, 0.0))


@transform
def randlora(w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None) -> Operator:
    """W + s sum_i B_i Diag(d_i) A Diag(g_i) over ceil(k / r) random frozen B_i and one A, k = min(n, m): of full rank.

    B_i and A are standard normal, A on the shorter side; d = 0 and g = 1 / k at the start; `alpha` is 20 r by default.
    arXiv 2502.00987
    """
    alpha = alpha or 20 * rank
    short, long = sorted((site.n, site.m))
    bases = math.ceil(short / rank)
    a = site.frozen("a", (rank, 1, short), normal(1.0))
    b = Dense(site.frozen("b", (long, bases * rank), normal(1.0)))
    d, g = site.tuned("d", (rank, bases), 0.0), site.tuned("g", (bases, short), 1 / short)
    scaled_a = Dense((d.unsqueeze(-1) * a * g.unsqueeze(-3)).flatten(-3, -2))
    if site.n > site.m:
        return w + scaled(site, rank, alpha) * (b @ scaled_a)
    left, right = (Dense(one.stored.transpose(-2, -1)) for one in (scaled_a, b))
    return w + scaled(site, rank, alpha) * (left @ right)


@transform
def loha(w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None) -> Operator:
    """W + s (A1 B1) * (A2 B2), entry by entry; A1, A2 normal, B1 = 0.1 normal, B2 = 0. FedPara, arXiv 2108.06098"""
    a1, b1 = site.tuned("a1", (site.n, rank), normal(1.0)), site.tuned("b1", (rank, site.m), normal(0.1))
    a2, b2 = site.tuned("a2", (site.n, rank), normal(1.0)), site.tuned("b2", (rank, site.m), 0.0)
    return w + scaled(site, rank, alpha) * Hadamard(Dense(a1) @ Dense(b1), Dense(a2) @ Dense(b2))


@transform
def lokr(w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None, factor: Factor = None) -> Operator:
    """W + s kron(C, A B), C = 0 and A, B Kaiming-uniform at the start. arXiv 2103.10385 (KronA), 2309.14859

    C has the largest divisors of n and m up to `factor`, by default up to their roots; A B is one matrix where `rank`
    is not smaller than half of its larger side.
    """
    (p, n), (q, m) = (_split(width, factor) for width in (site.n, site.m))
    c = site.tuned("c", (p, q), 0.0)
    if rank < max(n, m) / 2:
        a, b = site.tuned("a", (n, rank), kaiming_uniform), site.tuned("b", (rank, m), kaiming_uniform)
        return w + scaled(site, rank, alpha) * Kronecker(c, Dense(a) @ Dense(b), n)
    return w + Kronecker(c, Dense(site.tuned("d", (n, m), kaiming_uniform)), n)


def _split(width: int, most: int | None) -> tuple[int, int]:
    """The largest divisor up to `most`, by default up to the root, and the quotient."""
    divisor = next(i for i in range(min(most or math.isqrt(width), width), 0, -1) if width % i == 0)
    return divisor, width // divisor


@transform
def fourierft(w: Operator, site: Scope, *, frequencies: Width = 1000, scale: Positive = 150.0) -> Operator:
    """W + s Re(F^-1 D), F the two-dimensional Fourier transform and D tuned at random frequencies, 0 at the start.
    arXiv 2405.03003"""
    size = site.n * site.m
    count = min(frequencies, size)
    draw = lambda shape, generator: torch.randperm(size, generator=generator)[:count].expand(shape)  # noqa: E731
    indices, d = site.chosen("indices", count, draw), site.tuned("d", count, 0.0)
    spectrum = d.new_zeros((*site.shape[:-2], size)).scatter(-1, indices, d).unflatten(-1, (site.n, site.m))
    return w + scale * Dense(torch.real(torch.fft.ifft2(spectrum)))


@transform
def delora(w: Operator, site: Scope, *, rank: Rank, bound: Positive = 1.0) -> Operator:
    """W + c / r Diag(row_norm(W)) A Diag(1 / (norm(a_i) norm(b_i))) B; A Kaiming-uniform, B = 0, c = `bound`.
    arXiv 2503.18225"""
    a = site.tuned("a", (site.n, rank), kaiming_uniform)
    b = site.tuned("b", (rank, site.m), 0.0)
    lengths = torch.linalg.vector_norm(a, dim=-2).clamp_min(1e-4) * torch.linalg.vector_norm(b, dim=-1).clamp_min(1e-4)
    rows = torch.linalg.vector_norm(w.dense(), dim=-1).detach()
    return w + site.tuned("c", (1, 1), bound) * (Diag(rows) @ Dense(a) @ Diag(1 / (rank * lengths)) @ Dense(b))


@transform
def miss(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """W + E D, E identities (r, r) under each other, so row i of D serves the inputs i, i + r, ...; D = 0.
    arXiv 2409.15371"""

    def tiled(shape, generator):
        return torch.eye(rank).repeat(math.ceil(shape[-2] / rank), 1)[: shape[-2]].expand(shape)

    return w + Dense(site.frozen("e", (site.n, rank), tiled)) @ Dense(site.tuned("d", (rank, site.m), 0.0))


@transform
def tied_lora(w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None) -> Operator:
    """W + s A Diag(u) B Diag(v), A and B the same tuned tensors at all sites of a shape; u = 1 and v = 0 at the start.
    arXiv 2311.09578"""
    a = Dense(site.tied("a", (site.n, rank), kaiming_uniform))
    b = Dense(site.tied("b", (rank, site.m), kaiming_uniform))
    u, v = Diag(site.tuned("u", rank, 1.0)), Diag(site.tuned("v", site.m, 0.0))
    return w + scaled(site, rank, alpha) * (a @ u @ b @ v)


@transform
def lora_dash(
    w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None, directions: Width = 8, start: Share = 0.1
) -> Operator:
    """W + s A B + Ui Diag(d) Vi^t, i the `directions` that A B has changed most after the first `start` of the steps.

    Change is |u_i^t A B v_i| over the singular value; d = 0 until then. By the source's authors, arXiv 2409.01035.
    """
    u, _, vt = site.svd()
    count = min(directions, site.n, site.m)
    first = lambda shape, generator: torch.arange(count).expand(shape)  # noqa: E731
    indices, d = site.chosen("indices", count, first), site.tuned("d", count, 0.0)
    batch = site.shape[:-2]
    left = u.gather(-1, indices.unsqueeze(-2).expand(*batch, site.n, count))
    right = vt.gather(-2, indices.unsqueeze(-1).expand(*batch, count, site.m))
    a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
    b = Dense(site.tuned("b", (rank, site.m), 0.0))
    return w + scaled(site, rank, alpha) * (a @ b) + Dense(left) @ Diag(d) @ Dense(right)
