"""FRoD: the weight in its singular bases, tuned on the diagonal and at sparse places beside it."""

from rewriter.algebra import Dense, Diag, Operator, Patch
from rewriter.transforms import Density, Scope, choice, transform


@transform("reconstruction")
def frod(w: Operator, site: Scope, *, density: Density = 0.02) -> Operator:
    """U (Diag(t) + Sparse(D)) Vt, D at `density` k^2 random places off the diagonal, k = min(n, m); t = S, D = 0.
    doi 10.1609/aaai.v40i31.39813

    The bases are the weight's own; PEFT's right one is one for the weights of a kind in all layers.
    """
    u, s, vt = site.svd()
    k = min(site.n, site.m)
    count = min(round(density * k * k), k * (k - 1))
    off = lambda shape, g: (i := choice(k * (k - 1))(shape, g)) + i // k + 1  # noqa: E731
    middle = Diag(site.tuned("t", k, s))
    middle = Patch(middle, site.chosen("indices", count, off, below=k * k, distinct=True), site.tuned("d", count, 0.0))
    return Dense(u) @ middle @ Dense(vt)
