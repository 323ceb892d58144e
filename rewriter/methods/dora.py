"""Direction and magnitude of a weight's columns, tuned apart."""

from rewriter.algebra import Dense, Diag, Operator, column_norm, detach
from rewriter.transforms import Alpha, Rank, Scope, kaiming_uniform, transform


@transform("combination")
def dora(w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None) -> Operator:
    """V Diag(m / column_norm(V)), V = W + s A B; m = column norms of W; the norm takes no gradient. (32)(33)"""
    a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
    b = Dense(site.tuned("b", (rank, site.m), 0.0))
    v = w + (alpha or rank) / rank * (a @ b)
    norm = column_norm(detach(v)).clamp_min(1e-12)
    return v @ Diag(site.tuned("m", site.m, norm) / norm)
