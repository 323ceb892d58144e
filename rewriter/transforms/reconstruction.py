"""Reconstruction, phi(W) = f(W): W's subspaces are rescaled, replaced or shifted. Equations of arXiv 2407.05417v2."""

from ..algebra import Dense, Diag, Operator
from . import Scope, transform


@transform(vectors=None)
def full(w: Operator, site: Scope) -> Operator:
    """Every entry is tuned, from W itself: the baseline "Fully FT", and newly made heads."""
    return Dense(site.tuned("weight", (site.n, site.m), w.dense()))


@transform
def sam_parser(w: Operator, site: Scope) -> Operator:
    """U Diag(t) Vt, t = S at the start: the singular values are tuned. (7)"""
    u, s, vt = site.svd()
    return Dense(u) @ Diag(site.tuned("t", min(site.n, site.m), s)) @ Dense(vt)


@transform
def ia3(w: Operator, site: Scope) -> Operator:
    """W Diag(l), l = 1 at the start: the columns are rescaled. (10) with D1 = I"""
    return w @ Diag(site.tuned("l", site.m, 1.0))


@transform
def ssl(w: Operator, site: Scope) -> Operator:
    """Diag(l) W, l = 1 at the start: the rows are rescaled. (10) with D2 = I"""
    return Diag(site.tuned("l", site.n, 1.0)) @ w


@transform
def ssb(w: Operator, site: Scope) -> Operator:
    """Diag(l) W Diag(k), l = k = 1 at the start: rows and columns are rescaled. (10)"""
    return Diag(site.tuned("l", site.n, 1.0)) @ w @ Diag(site.tuned("k", site.m, 1.0))


@transform(vectors=True)
def bitfit(w: Operator, site: Scope) -> Operator:
    """b + d, d = 0 at the start: the last row of the augmented matrix [W; b]. (11)(12)"""
    return w + Dense(site.tuned("d", (1, site.m), 0.0))
