"""Reconstruction, phi(W) = f(W): W's subspaces are rescaled, replaced or shifted. Equations of arXiv 2407.05417v2."""

import math

import torch

from ..algebra import Affine, Blocks, Dense, Diag, Identity, Operator, Patch, Pointwise, Prepend, Shuffle, Value
from ..errors import SpecError
from . import (
    Alpha,
    Coefficient,
    Density,
    HiddenWidth,
    Interval,
    Length,
    Rank,
    Samples,
    Scope,
    Share,
    Width,
    kaiming_uniform,
    normal,
    transform,
)

ANY = ("matrix", "vector")
_LOW, _HIGH = -0.1, 1.1


@transform(on=ANY)
def full(w: Operator, site: Scope) -> Operator:
    """Every entry is tuned, from W itself: the baseline "Fully FT", and newly made heads."""
    return Dense(site.tuned("weight", (site.n, site.m), w.dense()))


@transform(on=("cross_attention",))
def xattn(w: Operator, site: Scope) -> Operator:
    """`full` on the weights of cross-attention (encoder-decoder models). Ref. 61"""
    return full(w, site)


@transform
def sam_parser(w: Operator, site: Scope) -> Operator:
    """U Diag(t) Vt, t = S at the start: the singular values are tuned. (7)"""
    u, s, vt = site.svd()
    return Dense(u) @ Diag(site.tuned("t", min(site.n, site.m), s)) @ Dense(vt)


@transform
def ia3(w: Operator, site: Scope) -> Operator:
    """W Diag(l), l = 1 at the start: the columns are rescaled. (10) with D1 = I"""
    return w @ Diag(site.tuned("l", site.m, 1.0))


@transform
def ssl(w: Operator, site: Scope) -> Operator:
    """Diag(l) W, l = 1 at the start: the rows are rescaled. (10) with D2 = I"""
    return Diag(site.tuned("l", site.n, 1.0)) @ w


@transform
def ssb(w: Operator, site: Scope) -> Operator:
    """Diag(l) W Diag(k), l = k = 1 at the start: rows and columns are rescaled. (10)"""
    return Diag(site.tuned("l", site.n, 1.0)) @ w @ Diag(site.tuned("k", site.m, 1.0))


@transform(on=("vector",))
def bitfit(w: Operator, site: Scope) -> Operator:
    """b + d, d = 0 at the start: the last row of the augmented matrix [W; b]. (11)(12)"""
    return w + Dense(site.tuned("d", (1, site.m), 0.0))


@transform(on=("vector",))
def s_bitfit(
    w: Operator, site: Scope, *, density: Density = 0.5, coefficient: Coefficient = 1e-3, end: Share = 0.5
) -> Operator:
    """b + z d, a gate z for every bias vector while they compete; the open gates' d are kept, d = 0. Ref. 41

    The biases with the largest gates are kept, as many as hold `density` of the entries, and tuned alone for the last
    `end` of the steps.
    """
    kept = site.size("entries", -1)
    if kept < 0:
        return w + Dense(gate(site, (1, 1), coefficient) * site.tuned("d", (1, site.m), 0.0))
    return w + Dense(site.tuned("d", (1, site.m), 0.0)) if kept else w


@transform(on=("keys", "values"))
def prefix(w: Operator, site: Scope, *, length: Length, hidden: HiddenWidth = None) -> Operator:
    """concat(P, xW) on keys and on values, P small and random at the start. (13)(14), ref. 56

    With `hidden`, P = tanh(E A + a) B + b while tuning, an MLP of that width; the adapter keeps P alone.
    """
    if hidden is None or site.size("folded", 0):
        return Prepend(site.tuned("p", (length, site.m), normal(0.02)), w)
    shapes = {"a": (site.m, hidden), "b": (hidden, site.m)}
    first, second = (
        Affine(Dense(site.tuned(name, shape, kaiming_uniform)), site.tuned(f"{name}_bias", shape[1], 0.0))
        for name, shape in shapes.items()
    )
    rows = (first @ Pointwise("tanh") @ second).apply(site.tuned("e", (length, site.m), normal(1.0)))
    return Prepend(rows, w)


@transform(on=("embeddings",))
def prompt(w: Operator, site: Scope, *, length: Length) -> Operator:
    """concat(P, embeddings), P rows of the vocabulary at the start. (13)(14), ref. 27"""

    def rows(shape, generator):
        table = w.dense()
        return table[torch.randint(len(table), shape[:1], generator=generator).to(table.device)]

    return Prepend(site.tuned("p", (length, site.m), rows), w)


@transform(on=ANY)
def diff_pruning(
    w: Operator, site: Scope, *, density: Density = 0.005, coefficient: Coefficient = 1e-7, end: Share = 0.5
) -> Operator:
    """W + Z * D, Z a hard-concrete gate for every entry, L0 penalty; then the largest |Z * D| are kept. Ref. 17

    D = 0 at the start. `density` of the entries of all sites together are kept, and tuned alone for the last `end` of
    the steps; `coefficient` is per entry.
    """
    kept = site.size("entries", -1)
    if kept >= 0:
        return patched(w, site, kept)
    z = gate(site, (site.n, site.m), coefficient)
    return Dense(w.dense() + z * site.tuned("d", (site.n, site.m), 0.0))


@transform(on=ANY)
def pafi(w: Operator, site: Scope, *, density: Density = 0.005) -> Operator:
    """W + Sparse(D), the entries of smallest magnitude in each weight; D = 0 at the start, no data needed. Ref. 63"""
    k = entries(site, density)
    return patched(w, site, k, lambda shape, _: w.dense().flatten(-2).abs().topk(k, largest=False).indices)


@transform(on=ANY)
def fish_mask(w: Operator, site: Scope, *, density: Density = 0.005, samples: Samples = 128) -> Operator:
    """W + Sparse(D), the entries of largest Fisher information over all sites together; D = 0 at the start. Ref. 59"""
    return patched(w, site, site.size("entries", entries(site, density)))


@transform(on=ANY)
def fish_dip(
    w: Operator, site: Scope, *, density: Density = 0.005, samples: Samples = 128, interval: Interval = 50
) -> Operator:
    """As `fish_mask`; every `interval` steps the mask is renewed on the `samples` rows of highest loss. Ref. 60

    An entry that leaves the mask goes back to W's, one that enters starts at 0; each weight keeps its number.
    """
    return fish_mask(w, site, density=density, samples=samples)


@transform
def spt(
    w: Operator,
    site: Scope,
    *,
    rank: Rank,
    alpha: Alpha = None,
    density: Density = 0.005,
    samples: Samples = 128,
) -> Operator:
    """W + Sparse(D), or W + s A B where at least r(n + m) of W's entries are sensitive; D = B = 0. Ref. 62

    The sensitive entries are `density` of all sites' together, by the squared gradient.
    """
    if site.size("rank", 0):
        a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
        return w + (alpha or rank) / rank * (a @ Dense(site.tuned("b", (rank, site.m), 0.0)))
    return patched(w, site, site.size("entries", entries(site, density)))


def entries(site: Scope, density: float) -> int:
    """How many entries of a site `density` is, at least one."""
    return max(1, round(density * site.n * site.m))


def patched(w: Operator, site: Scope, k: int, initial=None) -> Operator:
    """W with a tuned value, 0 at the start, added at k chosen entries."""

    def missing(shape, generator):
        raise SpecError(f"{site.prefix}: which entries are tuned has to be selected before the rewrite; see `allocate`")

    if k == 0:
        return w
    return Patch(w, site.chosen("indices", k, initial or missing), site.tuned("d", k, 0.0))


def gate(site: Scope, shape: tuple[int, int], coefficient: float) -> Value:
    """Hard-concrete gates z in [0, 1] (arXiv 1712.01312), almost open at the start, with the L0 penalty on P(z > 0).

    They are random in the train graph; elsewhere they have their value without noise.
    """
    temperature = 2 / 3
    alpha = site.tuned("alpha", shape, 3.0)
    site.penalty("l0", coefficient * (alpha - temperature * math.log(-_LOW / _HIGH)).sigmoid().sum())
    if site.training:
        u = torch.rand_like(alpha).clamp(1e-6, 1 - 1e-6)
        alpha = (u.log() - (1 - u).log() + alpha) / temperature
    return gate_value(alpha)


def gate_value(alpha: Value) -> Value:
    """z of a gate without noise."""
    return (alpha.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)


@transform
def oft(w: Operator, site: Scope, *, block: Width = 8) -> Operator:
    """R W, R block-diagonal and orthogonal: Cayley's transform of a skew matrix per block; R = I. arXiv 2306.07280"""
    return Blocks(cayley(site, divided(site, block), block)) @ w


@transform
def boft(w: Operator, site: Scope, *, block: Width = 4, factors: Width = 2) -> Operator:
    """M_k ... M_1 W Diag(l), M_i = P_i Blocks(R_i) P_i^t with butterfly permutations; R_i = I, l = 1. arXiv 2311.06243

    `factors` of them mix blocks over runs of block * 2^(i - 1) inputs, which have to divide the inputs.
    """
    if block % 2 or site.n % (block * 2 ** (factors - 1)):
        raise SpecError(f"boft: {site.n} inputs are not runs of {block} * 2^{factors - 1}, or {block} is odd")
    rotations = cayley(site, factors * site.n // block, block).unflatten(-3, (factors, -1))
    for i in range(factors):
        there, back = Shuffle(2, 2**i, block // 2), Shuffle(2**i, 2, block // 2)
        w = there @ Blocks(rotations[..., i, :, :, :]) @ back @ w
    return w @ Diag(site.tuned("l", site.m, 1.0))


@transform
def hra(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """H_r ... H_1 W, Householder reflections H = I - 2 u u^t / norm(u)^2; equal in pairs, so I at the start; r is even.
    arXiv 2405.17484"""
    if rank % 2:
        raise SpecError(f"hra: rank {rank} is odd, but reflections come in pairs")

    def pairs(shape, generator):
        return kaiming_uniform((*shape[:-1], rank // 2), generator).repeat_interleave(2, -1)

    u = site.tuned("u", (site.n, rank), pairs)
    u = u / torch.linalg.vector_norm(u, dim=-2, keepdim=True)
    for i in range(rank):
        column = u[..., i : i + 1]
        w = (Identity() - 2.0 * (Dense(column) @ Dense(column.transpose(-2, -1)))) @ w
    return w


@transform
def road(w: Operator, site: Scope) -> Operator:
    """W R, R rotates and scales pairs of outputs: a (cos t, sin t; -sin t, cos t); a = 1, t = 0. arXiv 2409.00119"""
    pairs = divided(site, 2, "outputs")
    angle, length = site.tuned("angle", pairs, 0.0), site.tuned("length", pairs, 1.0)
    c, s = length * angle.cos(), length * angle.sin()
    return w @ Blocks(torch.stack([torch.stack([c, s], -1), torch.stack([-s, c], -1)], -2))


def divided(site: Scope, size: int, of: str = "inputs") -> int:
    """How many blocks of a size the inputs or outputs of a site are.

    Raises:
        SpecError: they are no whole number of them.
    """
    width = site.n if of == "inputs" else site.m
    if width % size:
        raise SpecError(f"{site.prefix.split('.')[-1]}: {width} {of} are not whole blocks of {size}")
    return width // size


def cayley(site: Scope, count: int, size: int) -> Value:
    """Orthogonal blocks (..., count, size, size): (I - Q) (I + Q)^-1 of skew Q, their upper triangles tuned from 0."""
    q = site.tuned("q", (count, size * (size - 1) // 2), 0.0)
    square = q.new_ones((size, size))
    upper = q.new_zeros((*site.shape[:-2], count, size, size)).masked_scatter(square.triu(1).bool(), q)
    skew, unit = upper - upper.transpose(-2, -1), square.diagonal().diag()
    return torch.linalg.solve(unit + skew, unit - skew, left=False)
