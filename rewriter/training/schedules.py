"""Schedules at work: what transforms declare over the steps, before tuning, from step to step, and after it.

Nothing here knows a transform. Sites whose schedules are equal form a pool.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SpecError, SubspanError
from ..graph.traced import TracedModel
from ..plan import Plan, Site, plan
from ..rewrite import rewrite
from ..transforms import Member, Pool, Schedule
from ..tuned import TunedModel, adapter_tensors, chosen_tensors, tuned_parameters

Batch = Mapping[str, Tensor]
Objective = Callable[[nn.Module, Batch], Tensor]
Sizes = dict[str, dict[str, int]]
NOW = ".now"


class _Probe:
    """What the schedules of a model ask of the data, and of the optimiser while there is one."""

    def __init__(
        self,
        model: TracedModel,
        plan: Plan,
        rows: Sequence[Any],
        collate: Callable[[list], Batch] | None,
        objective: Objective | None,
        seed: int,
    ):
        self.model, self.data, self.collate, self.objective, self.seed = model, rows, collate, objective, seed
        self.rows = len(rows)
        self.sites = {name: site for site in plan.sites for name, _ in site.schedules}
        self.optimiser: torch.optim.Optimizer | None = None

    def _singles(self, rows: Sequence[int]) -> Iterable[Batch]:
        return (self.collate([self.data[i]]) for i in rows)

    def squared_gradients(self, names: list[str], rows: Sequence[int]) -> list[Tensor]:
        return sensitivities(self.model, [self.sites[name] for name in names], self._singles(rows), self.objective)

    def losses(self, rows: Sequence[int]) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return torch.stack([self.objective(self.model, one) for one in self._singles(rows)]).cpu()
        finally:
            self.model.train(was_training)

    def moments(self, leaf: str) -> list[Tensor]:
        weight = tuned_parameters(self.model)[leaf]
        state = self.optimiser.state[weight].values() if self.optimiser is not None else ()
        return [value for value in state if torch.is_tensor(value) and value.shape == weight.shape]


def pools(plan: Plan, probe: _Probe, tensors: Mapping[str, Tensor]) -> list[tuple[Schedule, Pool]]:
    """The schedules of a plan, each once, with all sites that declare an equal one, in the order of the sites."""
    groups: dict[Schedule, list[Member]] = {}
    members: dict[str, Member] = {}
    for site in plan.sites:
        for name, schedule in site.schedules:
            if name not in members:
                members[name] = Member(name, site.shape, _own(name, site, tensors))
            groups.setdefault(schedule, []).append(members[name])
    return [(schedule, Pool(tuple(some), probe)) for schedule, some in groups.items()]


def _own(name: str, site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaf -> tensor of a transform at a site; those that sites share (`frozen`, `tied`) by their plain name."""
    own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    for leaf in site.leaves if tensors else ():
        place, _, last = leaf.name.rpartition(".")
        if not leaf.name.startswith(f"{site.name}.") and place.rpartition(".")[2] == name.rpartition(".")[2]:
            own[last.rpartition("_")[0]] = tensors[leaf.name]
    return own


def _settled(groups: list[tuple[Schedule, Pool]]) -> tuple[Sizes, dict[str, Tensor]]:
    """What the members were given: sizes by name of the transform, values by leaf."""
    members = {one.name: one for _, pool in groups for one in pool}
    sizes = {name: dict(one.sizes) for name, one in members.items() if one.sizes}
    return sizes, {f"{name}.{leaf}": value for name, one in members.items() for leaf, value in one.values.items()}


def allocate(
    model: TracedModel, found: Plan, rows: Sequence[Any], collate: Callable[[list], Batch], objective: Objective
) -> tuple[Plan, dict[str, Tensor]]:
    """Let the schedules of a plan choose by the data what is tuned, e.g. which entries.

    Args:
        model: the traced model with its weights.
        found: its plan.
        rows, collate: training rows; the schedules say how many are read.
        objective: (model, batch) -> loss.

    Returns:
        The plan with the sizes that were chosen, and the values for `rewrite`: leaf name -> value.

    Raises:
        SpecError: the loss does not reach a weight.
    """
    probe = _Probe(model, found, rows, collate, objective, 0)
    groups = pools(found, probe, {})
    for schedule, pool in groups:
        if any(one.name not in found.given for one in pool):
            schedule.choose(pool)
    sizes, values = _settled(groups)
    if not sizes:
        return found, values
    return plan(model, list(found.rules), found.new, given={**found.given, **sizes}), values


def sensitivities(
    model: TracedModel, sites: list[Site], batches: Iterable[Batch], objective: Objective
) -> list[Tensor]:
    """The mean squared gradient of every entry of the sites' weights, shape (..., n, m): the diagonal of the empirical
    Fisher information where every batch is one row.

    One dense accumulator per weight lives while this runs.

    Raises:
        SpecError: the loss does not reach a weight.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    weights = {site.place: named[site.place] for site in sites}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    was_training, wanted = model.training, {name: weight.requires_grad for name, weight in weights.items()}
    model.eval()
    for weight in weights.values():
        weight.requires_grad_(True)
    count = 0
    try:
        for batch in batches:
            loss = objective(model, batch)
            if loss.requires_grad:
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            else:
                gradients = [None] * len(weights)
            for site, gradient in zip(dict.fromkeys(site.place for site in sites), gradients, strict=True):
                if gradient is None:
                    rule = next(one.rule for one in sites if one.place == site)
                    raise SpecError(
                        f"the loss does not depend on {site}, so its gradients decide nothing", ("rules", rule)
                    )
                sums[site] += gradient.square()
            count += 1
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(wanted[name])
        model.train(was_training)
    return [site.part(sums[site.place]) / max(count, 1) for site in sites]


class Budget:
    """Moves the schedules of a rewritten model, step by step of tuning.

    Call `before_step` when the gradients are there, `after_step` when the optimiser has stepped; `state` and `load`
    are for checkpoints.

    Args:
        model: from `rewrite`.
        rows, collate, objective: as of `allocate`, for schedules that look at data.
        seed: of what they draw.
    """

    def __init__(
        self,
        model: TunedModel,
        rows: Sequence[Any] = (),
        collate: Callable[[list], Batch] | None = None,
        objective: Objective | None = None,
        seed: int = 0,
    ):
        self.model = model
        self.probe = _Probe(model, model.plan, rows, collate, objective, seed)
        self.pools = pools(model.plan, self.probe, adapter_tensors(model))

    def before_step(self) -> None:
        """The gradients are there, the optimiser has not stepped."""
        for schedule, pool in self.pools:
            schedule.before_step(pool)

    def after_step(self, step: int, steps: int, optimiser: torch.optim.Optimizer | None = None) -> None:
        """The optimiser has stepped.

        Args:
            step, steps: optimiser steps done, and of the whole run.
            optimiser: its state follows entries that are moved.
        """
        self.probe.optimiser = optimiser
        for schedule, pool in self.pools:
            schedule.after_step(pool, step, steps)

    @property
    def members(self) -> dict[str, Member]:
        """Name of a transform at its site -> its part in the pools."""
        return {one.name: one for _, pool in self.pools for one in pool}

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for a checkpoint: the schedules' own, and what they have decided so far."""
        own = {f"{name}.{key}": value.clone() for name, one in self.members.items() for key, value in one.state.items()}
        return own | {f"{name}{NOW}": value for name, value in chosen_tensors(self.model).items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's state.

        Raises:
            SpecError: it is of another model.
        """
        chosen, members = chosen_tensors(self.model), self.members
        for name, value in state.items():
            if name.endswith(NOW) and name.removesuffix(NOW) in chosen:
                chosen[name.removesuffix(NOW)].copy_(value)
                continue
            owner = max((one for one in members if name.startswith(f"{one}.")), key=len, default=None)
            if owner is None:
                raise SpecError(f"the checkpoint keeps {name}, which no schedule of this model does")
            members[owner].state[name.removeprefix(f"{owner}.")] = value


def settle(model: TunedModel, budget: Budget | None = None) -> TunedModel:
    """The model with only what the schedules leave in the end; the model itself where they leave all.

    Args:
        model: from `rewrite`, tuned.
        budget: as it was moved while tuning; without it nothing of that is known.

    Raises:
        SubspanError: the model holds other adapters too.
    """
    groups = (budget or Budget(model)).pools
    for schedule, pool in groups:
        schedule.settle(pool)
    sizes, values = _settled(groups)
    if not (sizes or values):
        return model
    if len(model.adapters) > 1:
        raise SubspanError("settle an adapter before it is held together with others")
    found = plan(model.base, list(model.plan.rules), model.plan.new, given={**model.plan.given, **sizes})
    leaves = {name: value.detach() for name, value in adapter_tensors(model).items()}
    values = leaves | values
    return rewrite(model.base, found, values=values, without=model.without, also=model.also, given=model.given)
