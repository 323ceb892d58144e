"""PSOFT: an orthogonal map, with lengths, inside the principal subspace."""

from rewriter.algebra import Dense, Diag, Identity, Operator
from rewriter.methods.rotations import cayley
from rewriter.transforms import Rank, Scope, transform


@transform("combination")
def psoft(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """W + Ur (Diag(a) R Diag(b) - I) Sr Vrt, R = Cayley(Q) orthogonal; a = b = 1, Q = 0 at the start.
    openreview FSHrinMArK"""
    u, s, vt = site.svd()
    rotation = Dense(cayley(site, 1, rank)[..., 0, :, :])
    turned = Diag(site.tuned("a", rank, 1.0)) @ rotation @ Diag(site.tuned("b", rank, 1.0))
    return w + Dense(u[..., :rank]) @ (turned - Identity()) @ Diag(s[..., :rank]) @ Dense(vt[..., :rank, :])
