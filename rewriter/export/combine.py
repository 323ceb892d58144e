"""Arithmetic on adapters: the changes that runs made to the weights of one base, added with weights."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..algebra import as_dense
from ..graph.traced import TracedModel
from ..plan import plan
from ..rewrite import rewrite
from ..spec import Rule
from ..transforms import entire
from ..tuned import TunedModel
from .merge import changes, merged_weights

How = Literal["linear", "ties", "dare_linear", "dare_ties"]
HOWS: tuple[How, ...] = get_args(How)

Changes = Mapping[str, Tensor]


def changes_of(model: TunedModel) -> dict[str, Tensor]:
    """Weight -> phi(W) - W in the weight's own shape, float64, but of newly made parameters.

    Raises:
        SubspanError: something can't merge.
    """
    return {weight: sites[0].layout.restore(change) for weight, sites, _, change in changes(model)}


def heads_of(model: TunedModel) -> dict[str, Tensor]:
    """Newly made parameters as they are tuned."""
    merged = merged_weights(model, names=model.plan.new)
    return {name: merged.get(name, model.get_parameter(name).detach()) for name in model.plan.new}


def shared_of(model: TunedModel) -> dict[str, Tensor]:
    """Tuned weights of the base, merged."""
    return merged_weights(model, names=model.plan.by_weight().keys() - set(model.plan.new))


def combined(
    runs: Sequence[Changes], weights: Sequence[float], how: How = "linear", density: float = 1.0, seed: int = 0
) -> dict[str, Tensor]:
    """One change for each weight; a run that lacks a weight leaves it as it is.

    `linear` is the weighted sum (task arithmetic, arXiv 2212.04089; a negative weight negates). `ties` (arXiv
    2306.01708) keeps the largest entries of each run, elects a sign for each entry by the weighted sum and takes the
    mean of the weighted entries that have it. `dare_*` (arXiv 2311.03099) keep entries at random and divide them by
    `density` first.

    Args:
        runs: of each one weight -> change, shapes as stored.
        weights: one for each run.
        density: share of a run's entries, over all its weights, that is kept.
        seed: of what is kept at random.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = [_kept(one, how, density, generator) for one in runs]
    made = {}
    for name in sorted(set().union(*kept)):
        parts = [weight * one[name] for one, weight in zip(kept, weights, strict=True) if name in one]
        made[name] = _elected(parts) if how.endswith("ties") else sum(parts[1:], parts[0])
    return made


def _kept(change: Changes, how: How, density: float, generator: torch.Generator) -> Changes:
    if how == "linear" or not change:
        return change
    if how == "ties":
        sizes = torch.cat([value.abs().flatten() for value in change.values()])
        least = sizes.kthvalue(len(sizes) - math.ceil(density * len(sizes)) + 1).values
        return {name: value * (value.abs() >= least) for name, value in change.items()}
    return {
        name: change[name] * (torch.rand(change[name].shape, generator=generator) < density) / density
        for name in sorted(change)
    }


def _elected(parts: Sequence[Tensor]) -> Tensor:
    """The mean of those entries whose sign is that of the sum."""
    stacked = torch.stack(list(parts))
    agree = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp_min(1)


def as_whole(traced: TracedModel, change: Changes, heads: Mapping[str, Tensor], new: Sequence[str]) -> TunedModel:
    """A tuned model of W + change, every entry of it, and of newly made parameters.

    Args:
        traced: the base.
        heads: newly made parameters, as `heads_of` gives them.
        new: their names.
    """
    values = dict(heads)
    for name, value in change.items():
        stored = as_dense(traced.get_parameter(name).detach())
        values[name] = (stored.double() + value).to(torch.promote_types(stored.dtype, torch.float32))
    planned = plan(traced, [Rule(target=sorted(values), apply=[entire().name])], tuple(new))
    held = {site.leaves[0].name: site.layout.present(values[site.place]).dense() for site in planned.sites}
    return rewrite(traced, planned, values=held)
