"""HiRA: a change of full rank, the weight times a low-rank factor entry by entry."""

from rewriter.algebra import Dense, Hadamard, Operator
from rewriter.transforms import Rank, Scope, kaiming_uniform, transform


@transform("combination")
def hira(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """W + W * (A B), entry by entry; A Kaiming-uniform and B = 0 at the start. openreview TwJrTz9cRS (ICLR 2025)"""
    a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
    return w + Hadamard(w, a @ Dense(site.tuned("b", (rank, site.m), 0.0)))
