"""DEFT: a subspace of the outputs is taken away and filled anew."""

from rewriter.algebra import Dense, Operator
from rewriter.methods.lora import scaled
from rewriter.transforms import Alpha, Peft, Rank, Scope, normal, same, transform, transposed


@transform(
    "combination",
    peft=Peft(
        "DEFT",
        {"p": same("deft_P"), "r": transposed("deft_R")},
        {"rank": "r", "alpha": "alpha"},
        fixed={"decomposition_method": ("relu",)},
        ignored=frozenset({"init_scale"}),
    ),
)
def deft(w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None) -> Operator:
    """W (I - relu(P) Pt) + s R Pt, P (m, r) and R (n, r); P = 0.02 normal and s R = W relu(P) at the start.
    arXiv 2509.22793"""
    s, p = scaled(site, rank, alpha), site.tuned("p", (site.m, rank), normal(0.02))
    taken = w.dense() @ p.relu()
    filled = s * site.tuned("r", (site.n, rank), taken / s)
    return w + Dense(filled - taken) @ Dense(p.transpose(-2, -1))
