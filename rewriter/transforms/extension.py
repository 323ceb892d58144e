"""Extension, phi(W) = W + s dW: a tuned term is added to W. Equations of arXiv 2407.05417v2, (15)."""

from ..algebra import Dense, Diag, Dropout, Operator
from . import Alpha, Probability, Rank, Scope, eye, kaiming_uniform, transform


@transform
def lora(w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None, dropout: Probability = 0.0) -> Operator:
    """W + s A B, s = alpha / rank; A Kaiming-uniform and B = 0 at the start. (21)"""
    a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
    b = Dense(site.tuned("b", (rank, site.m), 0.0))
    return w + (alpha or rank) / rank * (Dropout(dropout, site.n) @ a @ b if dropout else a @ b)


@transform
def trilora(w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None) -> Operator:
    """W + s A Diag(d) B, s = alpha / rank; A Kaiming-uniform, d = 1 and B = 0 at the start. Ref. 70"""
    a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
    b = Dense(site.tuned("b", (rank, site.m), 0.0))
    return w + (alpha or rank) / rank * (a @ Diag(site.tuned("d", rank, 1.0)) @ b)


@transform
def flora(w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None) -> Operator:
    """W + s A M B, s = alpha / rank, M (rank, rank); A Kaiming-uniform, M = I and B = 0 at the start. Ref. 38"""
    a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
    b = Dense(site.tuned("b", (rank, site.m), 0.0))
    return w + (alpha or rank) / rank * (a @ Dense(site.tuned("m", (rank, rank), eye)) @ b)
