"""Biases alone."""

from rewriter.algebra import Dense, Operator
from rewriter.transforms import Scope, transform


@transform("reconstruction", on=("vector",))
def bitfit(w: Operator, site: Scope) -> Operator:
    """b + d, d = 0 at the start: the last row of the augmented matrix [W; b]. (11)(12)"""
    return w + Dense(site.tuned("d", (1, site.m), 0.0))
