"""HiRA: a change of full rank, the weight times a low-rank factor entry by entry."""

from rewriter.algebra import Dense, Hadamard, Operator
from rewriter.transforms import Peft, Rank, Scope, kaiming_uniform, transform, transposed


@transform(
    "combination",
    peft=Peft(
        "HIRA", {"a": transposed("hira_A"), "b": transposed("hira_B")}, {"rank": "r"}, patterns={"r": "rank_pattern"}
    ),
)
def hira(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """W + W * (A B), entry by entry; A Kaiming-uniform and B = 0 at the start. openreview TwJrTz9cRS (ICLR 2025)"""
    a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
    return w + Hadamard(w, a @ Dense(site.tuned("b", (rank, site.m), 0.0)))
