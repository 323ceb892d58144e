"""TinyLoRA: a handful of numbers for a whole weight."""

import torch

from rewriter.algebra import Dense, Diag, Operator
from rewriter.transforms import Count, Rank, Scope, normal, transform


@transform("extension")
def tinylora(w: Operator, site: Scope, *, rank: Rank = 2, numbers: Count = 64) -> Operator:
    """W + Ur Sr^(1/2) (sum_i v_i P_i) Sr^(1/2) Vrt, P_i (r, r) random and frozen; v = 0 at the start.
    arXiv 2602.04118"""
    u, s, vt = site.svd()
    root = Diag(s[..., :rank].sqrt())
    p = site.frozen("p", (numbers, rank, rank), normal(rank**-0.5))
    r = torch.einsum("...i,...ijk->...jk", site.tuned("v", numbers, 0.0), p)
    return w + Dense(u[..., :rank]) @ root @ Dense(r) @ root @ Dense(vt[..., :rank, :])
