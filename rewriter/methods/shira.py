"""SHiRA: as many entries as a low-rank change has, at random places."""

from rewriter.algebra import Operator
from rewriter.methods.masks import patched
from rewriter.transforms import Rank, Scope, choice, transform


@transform("reconstruction")
def shira(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """W + Sparse(D), r(n + m) random entries, all of them at most; D = 0 at the start. arXiv 2406.13175"""
    size = site.n * site.m
    return patched(w, site, min(size, rank * (site.n + site.m)), choice(size))
