"""GLoRA: a low-rank scaling of the entries and a low-rank term."""

from rewriter.algebra import Dense, Hadamard, Operator
from rewriter.transforms import Rank, Scope, kaiming_uniform, transform


@transform("combination")
def glora(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """W + W * (A1 B1) + A2 B2; A1, A2 Kaiming-uniform and B1 = B2 = 0 at the start. On W alone, not the bias.
    arXiv 2306.07967"""
    a1, b1, a2, b2 = (
        Dense(site.tuned(name, *start))
        for i in "12"
        for name, start in ((f"a{i}", ((site.n, rank), kaiming_uniform)), (f"b{i}", ((rank, site.m), 0.0)))
    )
    return w + Hadamard(w, a1 @ b1) + a2 @ b2
