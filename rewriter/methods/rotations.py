"""Orthogonal maps before or after a weight."""

import torch
from torch import Tensor

from rewriter.algebra import Blocks, Dense, Diag, Identity, Operator, Shuffle
from rewriter.errors import SpecError
from rewriter.transforms import Count, Rank, Scope, Width, kaiming_uniform, transform

_JOINED = 64  # The longest run whose rotations are multiplied before they are applied.


def cayley(site: Scope, count: int, size: int) -> Tensor:
    """Orthogonal blocks (..., count, size, size): (I - Q) (I + Q)^-1 of skew Q, their upper triangles tuned from 0."""
    q = site.tuned("q", (count, size * (size - 1) // 2), 0.0)
    square = q.new_ones((size, size))
    upper = q.new_zeros((*site.shape[:-2], count, size, size)).masked_scatter(square.triu(1).bool(), q)
    wide = torch.promote_types(q.dtype, torch.float32)  # There is no solver for half types.
    skew, unit = (upper - upper.transpose(-2, -1)).to(wide), square.diagonal().diag().to(wide)
    return torch.linalg.solve(unit + skew, unit - skew, left=False).to(q.dtype)


@transform("reconstruction")
def oft(w: Operator, site: Scope, *, block: Width = 8) -> Operator:
    """R W, R block-diagonal and orthogonal: Cayley's transform of a skew matrix per block; R = I. arXiv 2306.07280"""
    return Blocks(cayley(site, site.divided(block), block)) @ w


def _butterfly(i: int, block: int, blocks: Tensor) -> Operator:
    there, back = Shuffle(2, 2**i, block // 2), Shuffle(2**i, 2, block // 2)
    return there @ Blocks(blocks) @ back


@transform("reconstruction")
def boft(w: Operator, site: Scope, *, block: Width = 4, factors: Count = 2) -> Operator:
    """M_k ... M_1 W Diag(l), M_i = P_i Blocks(R_i) P_i^t with butterfly permutations; R_i = I, l = 1. arXiv 2311.06243

    `factors` of them mix blocks over runs of block * 2^(i - 1) inputs, which have to divide the inputs. Those of short
    runs are multiplied first: their product is block-diagonal too.
    """
    if block % 2 or site.n % (block * 2 ** (factors - 1)):
        raise SpecError(f"boft: {site.n} inputs are not runs of {block} * 2^{factors - 1}, or {block} is odd")
    joined = max(i for i in range(1, factors + 1) if i == 1 or block * 2 ** (i - 1) <= _JOINED)
    run = block * 2 ** (joined - 1)
    blocks = cayley(site, factors * site.n // block, block).unflatten(-3, (factors, -1))
    first = blocks[..., :joined, :, :, :].unflatten(-3, (-1, run // block))
    unit = torch.eye(run, dtype=blocks.dtype, device=blocks.device)
    for i in range(joined):
        unit = _butterfly(i, block, first[..., i, :, :, :, :]).lift(unit)
    w = Blocks(unit) @ w
    for i in range(joined, factors):
        w = _butterfly(i, block, blocks[..., i, :, :, :]) @ w
    return w @ Diag(site.tuned("l", site.m, 1.0))


@transform("reconstruction")
def hra(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """H_r ... H_1 W, Householder reflections H = I - 2 u u^t / norm(u)^2; equal in pairs, so I at the start; r is even.
    arXiv 2405.17484

    Their product is I - U T U^t, T the inverse of I / 2 + the strict lower triangle of U^t U (doi 10.1137/0910005).
    """
    if rank % 2:
        raise SpecError(f"hra: rank {rank} is odd, but reflections come in pairs")

    def pairs(shape, generator):
        return kaiming_uniform((*shape[:-1], rank // 2), generator).repeat_interleave(2, -1)

    stored = site.tuned("u", (site.n, rank), pairs)
    u = stored.to(torch.promote_types(stored.dtype, torch.float32))  # There is no solver for half types.
    u = u / torch.linalg.vector_norm(u, dim=-2, keepdim=True)
    unit = torch.eye(rank, dtype=u.dtype, device=u.device)
    middle = (u.transpose(-2, -1) @ u).tril(-1) + unit / 2
    middle = torch.linalg.solve_triangular(middle, unit.expand_as(middle), upper=False)
    u, middle = u.to(stored.dtype), middle.to(stored.dtype)
    return (Identity() - Dense(u) @ Dense(middle) @ Dense(u.transpose(-2, -1))) @ w


@transform("reconstruction")
def road(w: Operator, site: Scope) -> Operator:
    """W R, R rotates and scales pairs of outputs: a (cos t, sin t; -sin t, cos t); a = 1, t = 0. arXiv 2409.00119"""
    pairs = site.divided(2, "outputs")
    angle, length = site.tuned("angle", pairs, 0.0), site.tuned("length", pairs, 1.0)
    c, s = length * angle.cos(), length * angle.sin()
    return w @ Blocks(torch.stack([torch.stack([c, s], -1), torch.stack([-s, c], -1)], -2))
