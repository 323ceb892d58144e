"""Every entry of a weight."""

from rewriter.algebra import Dense, Operator
from rewriter.transforms import Peft, Scope, same, transform


@transform(
    "reconstruction",
    on=("matrix", "vector"),
    peft=Peft("", {"weight": same("")}, whole=True),
)
def full(w: Operator, site: Scope) -> Operator:
    """Every entry is tuned, from W itself: the baseline "Fully FT", and newly made heads."""
    return Dense(site.tuned("weight", (site.n, site.m), w.dense(), replaces=True))


@transform("reconstruction", on=("cross_attention",))
def xattn(w: Operator, site: Scope) -> Operator:
    """`full` on the weights of cross-attention (encoder-decoder models). Ref. 61"""
    return full(w, site)
