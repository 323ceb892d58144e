"""Rows and columns of a weight rescaled."""

from rewriter.algebra import Diag, Operator
from rewriter.transforms import Peft, Scope, reshaped, transform


@transform(
    "reconstruction",
    peft=Peft(
        "IA3",
        {"l": reshaped("ia3_l", lambda at: (at.m,), lambda at: (at.m, 1))},
        fits=lambda config, tensors: tensors["l"].shape[-1] == 1,
        ignored=frozenset({"feedforward_modules", "init_ia3_weights"}),
        bias=lambda bias, at: bias * at.values["l"],
    ),
)
def ia3(w: Operator, site: Scope) -> Operator:
    """W Diag(l), l = 1 at the start: the columns are rescaled. (10) with D1 = I"""
    return w @ Diag(site.tuned("l", site.m, 1.0))


@transform(
    "reconstruction",
    peft=Peft(
        "IA3",
        {"l": reshaped("ia3_l", lambda at: (at.n,), lambda at: (1, at.n))},
        fits=lambda config, tensors: tensors["l"].shape[-1] > 1,
        ignored=frozenset({"init_ia3_weights"}),
        listed="feedforward_modules",
    ),
)
def ssl(w: Operator, site: Scope) -> Operator:
    """Diag(l) W, l = 1 at the start: the rows are rescaled. (10) with D2 = I"""
    return Diag(site.tuned("l", site.n, 1.0)) @ w


@transform("reconstruction")
def ssb(w: Operator, site: Scope) -> Operator:
    """Diag(l) W Diag(k), l = k = 1 at the start: rows and columns are rescaled. (10)"""
    return Diag(site.tuned("l", site.n, 1.0)) @ w @ Diag(site.tuned("k", site.m, 1.0))
