"""Hadamard and Kronecker products of low-rank factors."""

import math

from rewriter.algebra import Dense, Hadamard, Kronecker, Operator
from rewriter.methods.lora import scaled
from rewriter.transforms import (
    Alpha,
    Factor,
    Peft,
    Place,
    Rank,
    Scope,
    Stored,
    kaiming_uniform,
    normal,
    transform,
    transposed,
)


@transform(
    "extension",
    peft=Peft(
        "LOHA",
        {
            "a1": transposed("hada_w1_b"),
            "b1": transposed("hada_w1_a"),
            "a2": transposed("hada_w2_b"),
            "b2": transposed("hada_w2_a"),
        },
        {"rank": "r", "alpha": "alpha"},
        write=lambda options: {"alpha": options.alpha or options.rank},
        patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
    ),
)
def loha(w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None) -> Operator:
    """W + s (A1 B1) * (A2 B2), entry by entry; A1, A2 normal, B1 = 0.1 normal, B2 = 0. FedPara, arXiv 2108.06098"""
    a1, b1 = site.tuned("a1", (site.n, rank), normal(1.0)), site.tuned("b1", (rank, site.m), normal(0.1))
    a2, b2 = site.tuned("a2", (site.n, rank), normal(1.0)), site.tuned("b2", (rank, site.m), 0.0)
    return w + scaled(site, rank, alpha) * Hadamard(Dense(a1) @ Dense(b1), Dense(a2) @ Dense(b2))


def _scale(at: Place) -> float:
    """PEFT scales the product also where its right factor is one matrix."""
    return (at.options.alpha or at.options.rank) / at.options.rank


@transform(
    "extension",
    peft=Peft(
        "LOKR",
        {
            "c": transposed("lokr_w1"),
            "a": transposed("lokr_w2_b", needed=False),
            "b": transposed("lokr_w2_a", needed=False),
            "d": Stored(
                "lokr_w2",
                lambda value, at: value.mT * _scale(at),
                lambda value, at: value.mT / _scale(at),
                needed=False,
            ),
        },
        {"rank": "r", "alpha": "alpha"},
        read=lambda config, _: {} if config["decompose_factor"] < 1 else {"factor": config["decompose_factor"]},
        write=lambda options: {"decompose_factor": options.factor or -1, "alpha": options.alpha or options.rank},
        ignored=frozenset({"decompose_factor", "rank_dropout_scale"}),
        patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
    ),
)
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
