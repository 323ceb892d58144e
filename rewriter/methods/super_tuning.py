"""Super-Tuning: the entries of largest magnitude; with a rank, a low-rank term beside them."""

import math
from typing import Annotated

from pydantic import Field

from rewriter.algebra import Dense, Operator
from rewriter.methods.lora import scaled
from rewriter.methods.masks import patched
from rewriter.transforms import (
    Alpha,
    AtMost,
    Density,
    Peft,
    Scope,
    Stored,
    kaiming_uniform,
    same,
    transform,
    transposed,
)

Beside = Annotated[
    int | None, Field(ge=1, description="rank of the term beside the entries; none by default"), AtMost(min)
]


def _sparsity(density: float) -> float:
    """The number that PEFT subtracts from 1 and has at least the density again, so that it counts as many entries."""
    found = 1 - density
    while 1 - found < density:
        found = math.nextafter(found, 0)
    return found


@transform(
    "reconstruction",
    peft=Peft(
        "SUPERTUNING",
        {
            "d": same("supertuning_values"),
            "indices": Stored(
                "supertuning_indices",
                lambda value, at: (value.long() % at.n) * at.m + value.long() // at.n,
                lambda value, at: ((value % at.m) * at.n + value // at.m).int(),
                needed=False,
            ),
            "a": transposed("supertuning_lora_A.weight", needed=False),
            "b": transposed("supertuning_lora_B.weight", needed=False),
        },
        {"rank": "r", "alpha": "lora_alpha"},
        read=lambda config, _: {"density": 1 - config["sparsity"]},
        write=lambda options: {"sparsity": _sparsity(options.density), "lora_alpha": options.alpha or options.rank},
        fixed={"select_top": (True,)},
        ignored=frozenset({"sparsity", "save_precomputed_indices"}),
    ),
)
def super_tuning(
    w: Operator, site: Scope, *, density: Density = 0.005, rank: Beside = None, alpha: Alpha = None
) -> Operator:
    """W + Sparse(D), the entries of largest magnitude in each weight, + s A B with a `rank`; D = B = 0.
    arXiv 2607.09287"""
    k = max(1, int(density * (site.n * site.m)))
    tuned = patched(w, site, k, lambda shape, _: w.dense().flatten(-2).abs().topk(k).indices)
    if rank is None:
        return tuned
    a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
    return tuned + scaled(site, rank, alpha) * (a @ Dense(site.tuned("b", (rank, site.m), 0.0)))
