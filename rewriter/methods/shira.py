"""SHiRA: as many entries as a low-rank change has, at random places."""

import torch

from rewriter.algebra import Operator
from rewriter.methods.masks import patched
from rewriter.transforms import Peft, Rank, Scope, Stored, choice, same, transform


@transform(
    "reconstruction",
    peft=Peft(
        "SHIRA",
        {
            "d": same("shira_weight"),
            "indices": Stored(
                "shira_indices",
                lambda value, at: (value[1] * at.m + value[0]).long(),
                lambda value, at: torch.stack([value % at.m, value // at.m]).int(),
            ),
        },
        {"rank": "r"},
        ignored=frozenset({"mask_type", "random_seed"}),
    ),
)
def shira(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """W + Sparse(D), r(n + m) random entries, all of them at most; D = 0 at the start. arXiv 2406.13175"""
    size = site.n * site.m
    return patched(w, site, min(size, rank * (site.n + site.m)), choice(size))
