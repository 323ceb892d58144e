"""Gates that compete while a change is tuned: diff pruning, and a search for biases."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.algebra import Dense, Operator
from rewriter.methods.masks import patched
from rewriter.transforms import Coefficient, Density, Member, Pool, Schedule, Scope, Share, largest, transform

_LOW, _HIGH = -0.1, 1.1


def gate(site: Scope, shape: tuple[int, int], coefficient: float) -> Tensor:
    """Hard-concrete gates z in [0, 1] (arXiv 1712.01312), almost open at the start, with the L0 penalty on P(z > 0).

    They are random in the train graph; elsewhere they have their value without noise.
    """
    temperature = 2 / 3
    alpha = site.tuned("alpha", shape, 3.0)
    site.penalty("l0", coefficient * (alpha - temperature * math.log(-_LOW / _HIGH)).sigmoid().sum())
    if site.training:
        u = torch.rand_like(alpha).clamp(1e-6, 1 - 1e-6)
        alpha = (u.log() - (1 - u).log() + alpha) / temperature
    return gate_value(alpha)


def gate_value(alpha: Tensor) -> Tensor:
    """z of a gate without noise."""
    return (alpha.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def _change(one: Member) -> Tensor:
    return (gate_value(one["alpha"]) * one["d"]).detach()


@dataclass(frozen=True)
class Cut(Schedule):
    """For the last `end` of the steps the entries that have changed most are tuned alone, `density` of all sites'."""

    density: float
    end: float

    def after_step(self, pool: Pool, step: int, steps: int) -> None:
        last = steps - round(self.end * steps)
        if step == last:
            for one, mask in zip(pool, self.masks(pool), strict=True):
                one.state["kept"] = mask
        if step >= last:
            pool.hold("d", "kept")

    def kept(self, pool: Pool) -> list[Tensor]:
        """Of every site the indices of the entries that have changed most."""
        return largest([one.entries(self.density) for one in pool], [_change(one).abs() for one in pool])

    def masks(self, pool: Pool) -> list[Tensor]:
        """`kept`, as masks of the entries."""
        return [
            torch.zeros(one["d"].flatten(-2).shape, dtype=torch.bool).scatter(-1, chosen, True).view_as(one["d"])
            for one, chosen in zip(pool, self.kept(pool), strict=True)
        ]

    def settle(self, pool: Pool) -> None:
        for one, chosen in zip(pool, self.kept(pool), strict=True):
            change = _change(one)
            one.sizes["entries"] = chosen.shape[-1]
            one.values["indices"] = chosen
            one.values["d"] = change.flatten(-2).gather(-1, chosen.to(change.device))


@transform("reconstruction", on=("matrix", "vector"))
def diff_pruning(
    w: Operator, site: Scope, *, density: Density = 0.005, coefficient: Coefficient = 1e-7, end: Share = 0.5
) -> Operator:
    """W + Z * D, Z a hard-concrete gate for every entry, L0 penalty; then the largest |Z * D| are kept. Ref. 17

    D = 0 at the start. `density` of the entries of all sites together are kept, and tuned alone for the last `end` of
    the steps; `coefficient` is per entry.
    """
    kept = site.size("entries", -1)
    if kept >= 0:
        return patched(w, site, kept)
    site.schedule(Cut(density, end))
    z = gate(site, (site.n, site.m), coefficient)
    return Dense(w.dense() + z * site.tuned("d", (site.n, site.m), 0.0))


@dataclass(frozen=True)
class CutVectors(Cut):
    """As `Cut`, all or nothing of a vector: those with the most open gates stay, one at least."""

    def masks(self, pool: Pool) -> list[Tensor]:
        masks = {one.name: torch.zeros(one["d"].shape, dtype=torch.bool) for one in pool}
        room = self.density * sum(mask.numel() for mask in masks.values())
        for i, one in enumerate(sorted(pool, key=lambda one: -one["alpha"].item())):
            mask = masks[one.name]
            if i == 0 or mask.numel() <= room:
                mask.fill_(True)
                room -= mask.numel()
        return list(masks.values())

    def settle(self, pool: Pool) -> None:
        for one, mask in zip(pool, self.masks(pool), strict=True):
            one.sizes["entries"] = int(one.state.get("kept", mask).sum())
            one.values["d"] = _change(one)


@transform("reconstruction", on=("vector",))
def s_bitfit(
    w: Operator, site: Scope, *, density: Density = 0.5, coefficient: Coefficient = 1e-3, end: Share = 0.5
) -> Operator:
    """b + z d, a gate z for every bias vector while they compete; the open gates' d are kept, d = 0. Ref. 41

    The biases with the largest gates are kept, as many as hold `density` of the entries, and tuned alone for the last
    `end` of the steps.
    """
    kept = site.size("entries", -1)
    if kept < 0:
        site.schedule(CutVectors(density, end))
        return w + Dense(gate(site, (1, 1), coefficient) * site.tuned("d", (1, site.m), 0.0))
    return w + Dense(site.tuned("d", (1, site.m), 0.0)) if kept else w
