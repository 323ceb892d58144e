"""A sparse change of a weight: entries chosen by magnitude, or by what the loss is sensitive to."""

from dataclasses import dataclass

import torch

from rewriter.algebra import Dense, Operator, Patch
from rewriter.errors import SpecError
from rewriter.transforms import (
    Alpha,
    Density,
    Interval,
    Pool,
    Rank,
    Samples,
    Schedule,
    Scope,
    kaiming_uniform,
    largest,
    transform,
)

CANDIDATES = 4  # times as many rows as are wanted are looked at for the hardest ones
ANY = ("matrix", "vector")


def entries(site: Scope, density: float) -> int:
    """How many entries of a site `density` is, at least one."""
    return max(1, round(density * site.n * site.m))


def patched(w: Operator, site: Scope, k: int, initial=None) -> Operator:
    """W with a tuned value, 0 at the start, added at k chosen entries."""

    def missing(shape, generator):
        raise SpecError(f"{site.transform}: which entries are tuned has to be selected before: see `allocate`")

    if k == 0:
        return w
    indices = site.chosen("indices", k, initial or missing, below=site.n * site.m, distinct=True)
    return Patch(w, indices, site.tuned("d", k, 0.0))


@transform("reconstruction", on=ANY)
def pafi(w: Operator, site: Scope, *, density: Density = 0.005) -> Operator:
    """W + Sparse(D), the entries of smallest magnitude in each weight; D = 0 at the start, no data needed. Ref. 63"""
    k = entries(site, density)
    return patched(w, site, k, lambda shape, _: w.dense().flatten(-2).abs().topk(k, largest=False).indices)


@dataclass(frozen=True)
class MostSensitive(Schedule):
    """The entries of largest Fisher information over all sites, by the first `samples` rows; where a weight has at
    least `r` (n + m) of them, a term of that rank (0: never)."""

    density: float
    samples: int
    r: int = 0

    def choose(self, pool: Pool) -> None:
        scores = pool.squared_gradients(range(min(pool.rows, self.samples)))
        indices = largest([one.entries(self.density) for one in pool], scores)
        for one, chosen in zip(pool, indices, strict=True):
            if self.r and chosen.ndim == 1 and len(chosen) >= self.r * sum(one.shape[-2:]):
                one.sizes["rank"] = self.r
            else:
                one.sizes["entries"], one.values["indices"] = chosen.shape[-1], chosen


@transform("reconstruction", on=ANY)
def fish_mask(w: Operator, site: Scope, *, density: Density = 0.005, samples: Samples = 128) -> Operator:
    """W + Sparse(D), the entries of largest Fisher information over all sites together; D = 0 at the start. Ref. 59"""
    site.schedule(MostSensitive(density, samples))
    return patched(w, site, site.size("entries", entries(site, density)))


@dataclass(frozen=True)
class Renew(Schedule):
    """Every `interval` steps the mask is chosen anew by the rows of highest loss."""

    samples: int
    interval: int

    def after_step(self, pool: Pool, step: int, steps: int) -> None:
        if step % self.interval or step >= steps:
            return
        order = torch.randperm(pool.rows, generator=pool.generator(step))[: CANDIDATES * self.samples].tolist()
        hardest = pool.losses(order).topk(min(len(order), self.samples)).indices
        scores = pool.squared_gradients([order[i] for i in hardest.tolist()])
        for one, score in zip(pool, scores, strict=True):
            if "indices" not in one.tensors:
                continue
            old, weight = one["indices"], one["d"]
            new = score.flatten(-2).topk(old.shape[-1]).indices.sort(-1).values.to(old.device)
            for tensor in (weight.data, *pool.moments(one, "d")):
                dense = torch.zeros(score.flatten(-2).shape, dtype=tensor.dtype, device=tensor.device)
                tensor.copy_(dense.scatter_(-1, old, tensor).gather(-1, new))
            old.copy_(new)


@transform("reconstruction", on=ANY)
def fish_dip(
    w: Operator, site: Scope, *, density: Density = 0.005, samples: Samples = 128, interval: Interval = 50
) -> Operator:
    """As `fish_mask`; every `interval` steps the mask is renewed on the `samples` rows of highest loss. Ref. 60

    An entry that leaves the mask goes back to W's, one that enters starts at 0; each weight keeps its number.
    """
    site.schedule(Renew(samples, interval))
    return fish_mask(w, site, density=density, samples=samples)


@transform("reconstruction", on=("matrix",))
def spt(
    w: Operator,
    site: Scope,
    *,
    rank: Rank,
    alpha: Alpha = None,
    density: Density = 0.005,
    samples: Samples = 128,
) -> Operator:
    """W + Sparse(D), or W + s A B where at least r(n + m) of W's entries are sensitive; D = B = 0. Ref. 62

    The sensitive entries are `density` of all sites' together, by the squared gradient.
    """
    site.schedule(MostSensitive(density, samples, rank))
    if site.size("rank", 0):
        a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
        return w + (alpha or rank) / rank * (a @ Dense(site.tuned("b", (rank, site.m), 0.0)))
    return patched(w, site, site.size("entries", entries(site, density)))
