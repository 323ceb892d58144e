"""Low-rank terms whose factors are frozen, or the same everywhere."""

import math

import torch
from torch import Tensor

from rewriter.algebra import Dense, Diag, Operator
from rewriter.methods.lora import scaled
from rewriter.transforms import (
    Alpha,
    Peft,
    Place,
    Rank,
    ScaleOf,
    Scope,
    Stored,
    he_uniform,
    kaiming_uniform,
    normal,
    same,
    transform,
)


@transform("extension")
def lora_fa(w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None, scale: ScaleOf = "fixed") -> Operator:
    """W + s A B, A random and frozen, B = 0 at the start. arXiv 2308.03303"""
    a = Dense(site.frozen("a", (site.n, rank), kaiming_uniform))
    return w + scaled(site, rank, alpha, scale) * (a @ Dense(site.tuned("b", (rank, site.m), 0.0)))


@transform("extension")
def lora_xs(w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None, scale: ScaleOf = "fixed") -> Operator:
    """W + s (Ur Sr) R Vr^t, R (r, r) = 0 at the start. arXiv 2405.17604"""
    u, s, vt = site.svd()
    r = Dense(site.tuned("r", (rank, rank), 0.0))
    change = Dense(u[..., :rank]) @ Diag(s[..., :rank]) @ r @ Dense(vt[..., :rank, :])
    return w + scaled(site, rank, alpha, scale) * change


@transform(
    "extension",
    peft=Peft(
        "VERA",
        {
            "d": same("vera_lambda_d"),
            "l": same("vera_lambda_b"),
            "a": Stored("vera_A", lambda value, at: value[:, : at.n].mT, lambda value, at: value.mT, shared=True),
            "b": Stored("vera_B", lambda value, at: value[: at.m].mT, lambda value, at: value.mT, shared=True),
        },
        {"rank": "r"},
        ignored=frozenset({"d_initial", "projection_prng_key"}),
    ),
)
def vera(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """W + A Diag(d) B Diag(l), A and B random, frozen and the same everywhere; d = 0.1, l = 0. arXiv 2310.11454"""
    a = Dense(site.frozen("a", (site.n, rank), he_uniform))
    b = Dense(site.frozen("b", (rank, site.m), he_uniform))
    return w + a @ Diag(site.tuned("d", rank, 0.1)) @ b @ Diag(site.tuned("l", site.m, 0.0))


def _bases(value: Tensor, at: Place) -> Tensor:
    count = math.ceil(min(at.n, at.m) / at.options.rank)
    return value[: max(at.n, at.m), :count].flatten(1)


def _as_bases(value: Tensor, at: Place) -> Tensor:
    return value.unflatten(1, (-1, at.options.rank))


@transform(
    "extension",
    peft=Peft(
        "RANDLORA",
        {
            "d": same("randlora_lambda"),
            "g": same("randlora_gamma"),
            "a": Stored(
                "randlora_A",
                lambda value, at: value[:, :1, : min(at.n, at.m)],
                lambda value, at: value,
                shared=True,
                size=lambda n, m, options: (options.rank, 1, min(n, m)),
            ),
            "b": Stored(
                "randlora_B",
                _bases,
                _as_bases,
                shared=True,
                size=lambda n, m, options: (max(n, m), math.ceil(min(n, m) / options.rank), options.rank),
            ),
        },
        {"rank": "r", "alpha": "randlora_alpha"},
        write=lambda options: {"randlora_alpha": options.alpha or 20 * options.rank},
        ignored=frozenset({"projection_prng_key", "sparse", "very_sparse"}),
    ),
)
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
    # The scales first: what is multiplied with a frozen tensor need not be kept for the backward.
    scaled_a = Dense((a * torch.einsum("...rb,...bs->...rbs", d, g)).flatten(-3, -2))
    if site.n > site.m:
        return w + scaled(site, rank, alpha) * (b @ scaled_a)
    left, right = (Dense(one.stored.transpose(-2, -1)) for one in (scaled_a, b))
    return w + scaled(site, rank, alpha) * (left @ right)


@transform("extension")
def tied_lora(w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None) -> Operator:
    """W + s A Diag(u) B Diag(v), A and B the same tuned tensors at all sites of a shape; u = 1 and v = 0 at the start.
    arXiv 2311.09578"""
    a = Dense(site.tied("a", (site.n, rank), kaiming_uniform))
    b = Dense(site.tied("b", (rank, site.m), kaiming_uniform))
    u, v = Diag(site.tuned("u", rank, 1.0)), Diag(site.tuned("v", site.m, 0.0))
    return w + scaled(site, rank, alpha) * (a @ u @ b @ v)


@transform(
    "extension",
    peft=Peft(
        "MISS",
        {"d": same("miss_block")},
        {"rank": "r"},
        fixed={"init_weights": (True, False)},
        ignored=frozenset({"mini_r"}),
    ),
)
def miss(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """W + E D, E identities (r, r) under each other, so row i of D serves the inputs i, i + r, ...; D = 0.
    arXiv 2409.15371"""

    def tiled(shape, generator):
        return torch.eye(rank).repeat(math.ceil(shape[-2] / rank), 1)[: shape[-2]].expand(shape)

    return w + Dense(site.frozen("e", (site.n, rank), tiled)) @ Dense(site.tuned("d", (rank, site.m), 0.0))
