"""Combination, phi(W) = g(f(W)): reconstruction and extension in one method. Equations of arXiv 2407.05417v2."""

from ..algebra import Dense, Diag, Operator, column_norm, detach
from . import Alpha, Length, Rank, Scope, kaiming_uniform, transform
from .extension import pa
from .reconstruction import prefix


@transform
def dora(w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None) -> Operator:
    """V Diag(m / column_norm(V)), V = W + s A B; m = column norms of W; the norm takes no gradient. (32)(33)"""
    a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
    b = Dense(site.tuned("b", (rank, site.m), 0.0))
    v = w + (alpha or rank) / rank * (a @ b)
    norm = column_norm(detach(v)).clamp_min(1e-12)
    return v @ Diag(site.tuned("m", site.m, norm) / norm)


@transform
def spectral(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """(Ur + A) Sr (Vr + B)t + the rest of W: the top singular vectors are tuned; A = B = 0 at the start. (37)(38)"""
    u, s, vt = site.svd()
    u, s, vt = u[..., :rank], Diag(s[..., :rank]), vt[..., :rank, :]
    a = site.tuned("a", (site.n, rank), 0.0)
    b = site.tuned("b", (rank, site.m), 0.0)
    return w + Dense(u + a) @ s @ Dense(vt + b) - Dense(u) @ s @ Dense(vt)


@transform
def svdiff(w: Operator, site: Scope) -> Operator:
    """U Diag(relu(S + d)) Vt, d = 0 at the start: the singular values are shifted and stay non-negative. (39)(40)"""
    u, s, vt = site.svd()
    return Dense(u) @ Diag((s + site.tuned("d", min(site.n, site.m), 0.0)).relu()) @ Dense(vt)


@transform(on=("keys", "values", "feed_forward"))
def mam(w: Operator, site: Scope, *, length: Length, rank: Rank, alpha: Alpha = None) -> Operator:
    """`prefix` on the attention and `pa` beside the feed-forward of a layer. Ref. 18"""
    if site.kind == "feed_forward":
        return pa(w, site, rank=rank, alpha=alpha)
    return prefix(w, site, length=length)
