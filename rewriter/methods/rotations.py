"""Orthogonal maps before or after a weight."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rewriter.algebra import Blocks, Dense, Diag, Identity, Operator, Shuffle
from rewriter.errors import SpecError
from rewriter.transforms import (
    Count,
    Peft,
    Place,
    Rank,
    Scope,
    Stored,
    Width,
    kaiming_uniform,
    reshaped,
    same,
    transform,
)

_JOINED = 64  # The longest run whose rotations are multiplied before they are applied.


Terms = Annotated[
    int | None,
    Field(ge=4, le=64, description="terms of Neumann's series in the place of the inverse; default: the inverse"),
]
Group = Annotated[int, Field(ge=2, multiple_of=2, description="outputs i and i + group / 2 of each run are a pair")]


def cayley(site: Scope, count: int, size: int, terms: int | None = None) -> Tensor:
    """Blocks (..., count, size, size): (I - Q) (I + Q)^-1 of skew Q, their upper triangles tuned from 0: orthogonal.

    With `terms` k: I + 2 (Q + ... + Q^(k - 2)) + Q^(k - 1), near (I + Q) (I - Q)^-1 for small Q. arXiv 2506.19847
    """
    q = site.tuned("q", (count, size * (size - 1) // 2), 0.0)
    square = q.new_ones((size, size))
    upper = q.new_zeros((*site.shape[:-2], count, size, size)).masked_scatter(square.triu(1).bool(), q)
    wide = torch.promote_types(q.dtype, torch.float32)  # There is no solver for half types.
    skew, unit = (upper - upper.transpose(-2, -1)).to(wide), square.diagonal().diag().to(wide)
    if terms:
        return _series(skew, unit, terms).to(q.dtype)
    return torch.linalg.solve(unit + skew, unit - skew, left=False).to(q.dtype)


def _terms(config, tensors) -> dict[str, int]:
    count = config["num_cayley_neumann_terms"] if config["use_cayley_neumann"] else None
    if count is not None and count < 3:
        raise ValueError(f"num_cayley_neumann_terms: {count} is fewer than 3")
    own = {} if count is None else {"terms": max(4, count)}  # PEFT's 3 are 4.
    entries = tensors["q"].shape[-1]  # b (b - 1) / 2; by `r` blocks PEFT writes no size.
    return own if config["oft_block_size"] else own | {"block": (1 + math.isqrt(1 + 8 * entries)) // 2}


def _series(skew: Tensor, unit: Tensor, terms: int) -> Tensor:
    power, total = skew, unit + 2 * skew
    for _ in range(terms - 3):
        power = power @ skew
        total = total + 2 * power
    return total + power @ skew


@transform(
    "reconstruction",
    peft=Peft(
        "OFT",
        {"q": same("oft_R.weight")},
        {"block": "oft_block_size"},
        read=_terms,
        write=lambda options: (
            {"r": 0, "use_cayley_neumann": bool(options.terms)}
            | ({"num_cayley_neumann_terms": options.terms} if options.terms else {})
        ),
        ignored=frozenset({"r", "eps", "use_cayley_neumann", "num_cayley_neumann_terms"}),
    ),
)
def oft(w: Operator, site: Scope, *, block: Width = 8, terms: Terms = None) -> Operator:
    """R W, R block-diagonal and orthogonal: Cayley's transform of a skew matrix per block; R = I. arXiv 2306.07280"""
    return Blocks(cayley(site, site.divided(block), block, terms)) @ w


def _butterfly(i: int, block: int, blocks: Tensor) -> Operator:
    there, back = Shuffle(2, 2**i, block // 2), Shuffle(2**i, 2, block // 2)
    return there @ Blocks(blocks) @ back


def _uppers(value: Tensor, at: Place) -> Tensor:
    """Upper triangles of the skew parts of square blocks."""
    half = (value - value.mT) / 2
    return half[..., *torch.triu_indices(*value.shape[-2:], 1)].flatten(0, 1)


def _skews(value: Tensor, at: Place) -> Tensor:
    size = at.options.block
    upper = value.new_zeros(len(value), size, size)
    upper[:, *torch.triu_indices(size, size, 1)] = value
    return (upper - upper.mT).unflatten(0, (at.options.factors, -1))


@transform(
    "reconstruction",
    peft=Peft(
        "BOFT",
        {"q": Stored("boft_R", _uppers, _skews), "l": reshaped("boft_s", lambda at: (at.m,), lambda at: (at.m, 1))},
        {"block": "boft_block_size", "factors": "boft_n_butterfly_factor"},
        read=lambda config, tensors: {} if config["boft_block_size"] else {"block": tensors["q"].shape[-1]},
        fixed={"boft_n_butterfly_factor": (1,)},  # More of them PEFT has on CUDA alone: not compared.
        ignored=frozenset({"boft_block_num"}),
    ),
)
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


@transform("reconstruction", peft=Peft("HRA", {"u": same("hra_u")}, {"rank": "r"}))
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


def _turned(bias: Tensor, at: Place) -> Tensor:
    return road_map(at.values["angle"], at.values["length"], at.options.group).apply(bias.unsqueeze(0)).squeeze(0)


@transform(
    "reconstruction",
    peft=Peft(
        "ROAD",
        {"angle": same("road_theta"), "length": same("road_alpha")},
        {"group": "group_size"},
        fixed={"variant": ("road_1",)},
        bias=_turned,
    ),
)
def road(w: Operator, site: Scope, *, group: Group = 2) -> Operator:
    """W R, R rotates and scales pairs of outputs: a (cos t, sin t; -sin t, cos t); a = 1, t = 0. arXiv 2409.00119"""
    pairs = site.divided(group, "outputs") * group // 2
    return w @ road_map(site.tuned("angle", pairs, 0.0), site.tuned("length", pairs, 1.0), group)


def road_map(angle: Tensor, length: Tensor, group: int) -> Operator:
    """R of RoAD (m, m), of m / 2 angles and lengths."""
    c, s = length * angle.cos(), length * angle.sin()
    turns = Blocks(torch.stack([torch.stack([c, s], -1), torch.stack([-s, c], -1)], -2))
    return turns if group == 2 else Shuffle(2, group // 2, 1) @ turns @ Shuffle(group // 2, 2, 1)
