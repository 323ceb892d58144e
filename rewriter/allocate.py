"""What a budget leaves of a method: chosen before tuning, moved while tuning, settled after it.

Methods whose sites compete for one budget form a pool: all sites of a method with the same options.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from .algebra import Computed, Prepend
from .plan import Plan, Site, plan
from .rewrite import PREFIX, chosen_indices, rewrite, tuned_parameters
from .trace import GraphModel
from .transforms import steps
from .transforms.reconstruction import gate_value

Batch = Mapping[str, Tensor]
Objective = Callable[[nn.Module, Batch], Tensor]
SELECTED = ("fish_mask", "fish_dip", "spt")
CUT = ("diff_pruning", "s_bitfit")
DECAY = 0.85
CANDIDATES = 4


@dataclass(frozen=True)
class Step:
    """One method of a site's chain: `name` is the prefix of its leaves."""

    name: str
    site: Site
    method: str
    options: BaseModel

    def leaf(self, name: str) -> str:
        return f"{self.name}.{name}"

    @property
    def entries(self) -> int:
        """Entries that the method's density allows this site, for each matrix of a batch."""
        n, m = self.site.shape[-2:]
        return max(1, round(self.options.density * n * m))


def pools(plan: Plan, *methods: str) -> list[list[Step]]:
    """The steps of the given methods, those with the same options together."""
    groups: dict[Any, list[Step]] = {}
    for site in plan.sites:
        for name, method, options in steps(site.chain, site.name):
            if method.name in methods:
                groups.setdefault((method.name, options), []).append(Step(name, site, method.name, options))
    return list(groups.values())


def allocate(
    model: GraphModel, found: Plan, rows: Sequence[Any], collate: Callable[[list], Batch], objective: Objective
) -> tuple[Plan, dict[str, Tensor]]:
    """Choose by gradients on a share of the data which entries `fish_mask`, `fish_dip` and `spt` tune.

    Args:
        model: the traced model with its weights.
        found: its plan.
        rows, collate: training rows; the first ones are read, as many as the methods' `samples` say.
        objective: (model, batch) -> loss.

    Returns:
        The plan with the sizes that were chosen, and the values for `rewrite`: leaf name -> indices.
    """
    groups = pools(found, *SELECTED)
    given, values = dict(found.given), {}
    for group in groups:
        count = min(len(rows), group[0].options.samples)
        scores = sensitivities(model, [step.site for step in group], _singles(rows, range(count), collate), objective)
        indices = largest([step.entries for step in group], scores)
        for step, chosen in zip(group, indices, strict=True):
            n, m = step.site.shape[-2:]
            if step.method == "spt" and chosen.ndim == 1 and len(chosen) >= step.options.rank * (n + m):
                given[step.name] = {"rank": step.options.rank}
            else:
                given[step.name] = {"entries": chosen.shape[-1]}
                values[step.leaf("indices")] = chosen
    return (plan(model, list(found.rules), found.new, given=given) if groups else found), values


def _singles(rows: Sequence[Any], order: Iterable[int], collate: Callable[[list], Batch]) -> Iterable[Batch]:
    return (collate([rows[i]]) for i in order)


def sensitivities(model: GraphModel, sites: list[Site], batches: Iterable[Batch], objective: Objective) -> list[Tensor]:
    """The mean squared gradient of every entry of the sites' weights, shape (..., n, m): the diagonal of the empirical
    Fisher information where every batch is one row.

    One dense accumulator per weight lives while this runs.
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
            for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                sums[name] += gradient.square()
            count += 1
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(wanted[name])
        model.train(was_training)
    return [site.part(sums[site.place]) / max(count, 1) for site in sites]


def largest(counts: list[int], scores: list[Tensor]) -> list[Tensor]:
    """Row-major indices (int64, ascending) of the largest scores of all sites together, as many as `counts` sum to.

    Batches of matrices keep their own count for each matrix, since one tensor holds them all.
    """
    batched = [score.ndim > 2 for score in scores]
    flat = [score.flatten(-2) for score in scores]
    pooled = [values for values, alone in zip(flat, batched, strict=True) if not alone]
    total = sum(count for count, alone in zip(counts, batched, strict=True) if not alone)
    mask = torch.zeros(sum(map(len, pooled)), dtype=torch.bool)
    if pooled:
        mask[torch.cat(pooled).cpu().topk(total).indices] = True
    parts = iter(mask.split([len(values) for values in pooled]))
    return [
        values.topk(count).indices.sort().values.cpu() if alone else next(parts).nonzero().squeeze(-1)
        for values, count, alone in zip(flat, counts, batched, strict=True)
    ]


class Budget:
    """Moves the budgets of `adalora`, `diff_pruning`, `s_bitfit`, `fish_dip` and `lora_dash`, step by step of tuning.

    Call `before_step` when the gradients are there, `after_step` when the optimiser has stepped; `state` and `load`
    are for checkpoints.

    Args:
        model: from `rewrite`.
        rows, collate, objective, seed: as of `allocate`, for `fish_dip`.
    """

    def __init__(
        self,
        model: GraphModel,
        rows: Sequence[Any] = (),
        collate: Callable[[list], Batch] | None = None,
        objective: Objective | None = None,
        seed: int = 0,
    ):
        self.model, self.seed = model, seed
        self.rows, self.collate, self.objective = rows, collate, objective
        self.ranks = pools(model.plan, "adalora") if not _settled(model.plan, "adalora") else []
        self.cuts = [group for name in CUT if not _settled(model.plan, name) for group in pools(model.plan, name)]
        self.masks = pools(model.plan, "fish_dip")
        self.dashes = [step for group in pools(model.plan, "lora_dash") for step in group]
        self.moments: dict[str, Tensor] = {}

    def before_step(self) -> None:
        """Follow the sensitivity |w dL/dw| of AdaLoRA's triplets and its uncertainty: moving averages. Ref. 37"""
        parameters = tuned_parameters(self.model)
        for step in (step for group in self.ranks for step in group):
            for leaf in ("a", "d", "b"):
                weight = parameters[step.leaf(leaf)]
                if weight.grad is None:
                    continue
                now = (weight.detach() * weight.grad).abs()
                mean, spread = (
                    self.moments.setdefault(f"{step.leaf(leaf)}.{name}", torch.zeros_like(now)).to(now.device)
                    for name in ("mean", "spread")
                )
                mean = DECAY * mean + (1 - DECAY) * now
                self.moments[f"{step.leaf(leaf)}.mean"] = mean
                self.moments[f"{step.leaf(leaf)}.spread"] = DECAY * spread + (1 - DECAY) * (now - mean).abs()

    def after_step(self, step: int, steps: int, optimiser: torch.optim.Optimizer | None = None) -> None:
        """Prune AdaLoRA's triplets to the schedule, cut `diff_pruning` and `s_bitfit` to their budgets, choose the
        directions of `lora_dash`, renew the masks of `fish_dip`.

        Args:
            step, steps: optimiser steps done, and of the whole run.
            optimiser: its state follows entries that stay in a mask.
        """
        for group in self.ranks:
            self._prune(group, step, steps)
        for group in self.cuts:
            self._cut(group, step, steps)
        for one in self.dashes:
            self._launch(one, step, round(one.options.start * steps))
        for group in self.masks:
            if step % group[0].options.interval == 0 and step < steps:
                self._renew(group, step, optimiser)

    def _prune(self, group: list[Step], step: int, steps: int) -> None:
        options = group[0].options
        last = steps - round(options.end * steps)
        parameters = tuned_parameters(self.model)
        weights = [parameters[one.leaf("d")] for one in group]
        if step <= last and (step == last or step % options.interval == 0):
            matrices = sum(math.prod(one.site.shape[:-2]) for one in group)
            kept = scheduled_rank(options, step, steps, matrices)
            scores = torch.cat([self._importance(one).flatten() for one in group])
            mask = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
            mask[scores.topk(min(kept, len(scores))).indices] = True
            for one, part, weight in zip(group, mask.split([w.numel() for w in weights]), weights, strict=True):
                self.moments[one.leaf("kept")] = part.view_as(weight)
        elif step <= last:
            return
        self._hold(group)

    def _cut(self, group: list[Step], step: int, steps: int) -> None:
        last = steps - round(group[0].options.end * steps)
        leaves = tuned_parameters(self.model)
        if step == last:
            masks = _open(group, leaves) if group[0].method == "s_bitfit" else _masks(group, leaves)
            self.moments |= {one.leaf("kept"): mask for one, mask in zip(group, masks, strict=True)}
        if step >= last:
            self._hold(group)

    def _hold(self, group: list[Step]) -> None:
        """Keep at 0 what is not kept of the steps' d."""
        leaves = tuned_parameters(self.model)
        with torch.no_grad():
            for one in group:
                weight = leaves[one.leaf("d")]
                weight *= self.moments[one.leaf("kept")].to(weight.device)

    def _launch(self, one: Step, step: int, launch: int) -> None:
        if step > launch:
            return
        leaves = tuned_parameters(self.model)
        with torch.no_grad():
            leaves[one.leaf("d")].zero_()
            if step == launch:
                u, s, vt = (self.model.get_buffer(PREFIX + one.leaf(name)) for name in ("u", "s", "vt"))
                change = (u * (leaves[one.leaf("a")] @ (leaves[one.leaf("b")] @ vt.transpose(-2, -1)))).sum(-2).abs()
                indices = chosen_indices(self.model)[one.leaf("indices")]
                indices.copy_((change / (s + 1e-6)).topk(indices.shape[-1]).indices)

    def _importance(self, step: Step) -> Tensor:
        """Of each triplet: its d's and the means over its column of A and its row of B."""
        a, d, b = (
            self.moments[f"{step.leaf(leaf)}.mean"] * self.moments[f"{step.leaf(leaf)}.spread"]
            for leaf in ("a", "d", "b")
        )
        return d + a.mean(-2) + b.mean(-1)

    def _renew(self, group: list[Step], step: int, optimiser: torch.optim.Optimizer | None) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        order = torch.randperm(len(self.rows), generator=generator)[: CANDIDATES * group[0].options.samples].tolist()
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            losses = torch.stack([self.objective(self.model, one) for one in _singles(self.rows, order, self.collate)])
        self.model.train(was_training)
        hardest = losses.cpu().topk(min(len(order), group[0].options.samples)).indices
        batches = _singles(self.rows, [order[i] for i in hardest.tolist()], self.collate)
        scores = sensitivities(self.model, [one.site for one in group], batches, self.objective)
        parameters, indices = tuned_parameters(self.model), chosen_indices(self.model)
        for one, score in zip(group, scores, strict=True):
            if one.leaf("indices") not in indices:
                continue
            old, weight = indices[one.leaf("indices")], parameters[one.leaf("d")]
            new = score.flatten(-2).topk(old.shape[-1]).indices.sort(-1).values.to(old.device)
            tensors = [weight.data]
            if optimiser is not None:
                tensors += [
                    t for t in optimiser.state[weight].values() if torch.is_tensor(t) and t.shape == weight.shape
                ]
            for tensor in tensors:
                dense = torch.zeros(score.flatten(-2).shape, dtype=tensor.dtype, device=tensor.device)
                tensor.copy_(dense.scatter_(-1, old, tensor).gather(-1, new))
            old.copy_(new)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for a checkpoint."""
        return {**self.moments, **{f"{name}.now": value for name, value in chosen_indices(self.model).items()}}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's state."""
        indices = chosen_indices(self.model)
        for name, value in state.items():
            if name.endswith(".now"):
                indices[name.removesuffix(".now")].copy_(value)
            else:
                self.moments[name] = value


def scheduled_rank(options: BaseModel, step: int, steps: int, matrices: int) -> int:
    """The sum of the ranks that AdaLoRA's cubic schedule leaves at a step. Ref. 37, (12)

    Args:
        options: of `adalora`.
        step, steps: done, and of the whole run.
        matrices: how many share the budget.
    """
    first = options.rank * matrices
    final = (options.target_rank or math.ceil(2 * options.rank / 3)) * matrices
    start, end = round(options.start * steps), steps - round(options.end * steps)
    if step <= start and step < end:
        return first
    left = max(0.0, 1 - (step - start) / max(1, end - start))
    return round(final + (first - final) * left**3)


def _settled(found: Plan, method: str) -> bool:
    return any(step.rpartition(".")[2].startswith(method) for step in found.given)


def settle(model: GraphModel, budget: Budget | None = None) -> GraphModel:
    """The model with only what survived: AdaLoRA's kept triplets, the entries of largest change of `diff_pruning`, the
    biases with open gates of `s_bitfit`, the rows of a reparameterised `prefix`. The model itself if there is none.

    Args:
        model: from `rewrite`, tuned.
        budget: as it was moved while tuning; without it no triplet of AdaLoRA has been pruned.
    """
    leaves = {name.removeprefix(PREFIX): value.detach() for name, value in _tensors(model).items()}
    given, values = dict(model.plan.given), dict(leaves)
    for group in pools(model.plan, "adalora"):
        for step in group:
            kept = (budget.moments if budget else {}).get(step.leaf("kept"))
            if kept is None or step.name in given or kept.ndim > 1:
                continue
            for leaf, dim in (("a", -1), ("d", -1), ("b", -2)):
                keep = kept.to(leaves[step.leaf(leaf)].device).nonzero().squeeze(-1)
                values[step.leaf(leaf)] = leaves[step.leaf(leaf)].index_select(dim, keep)
            given[step.name] = {"rank": int(kept.sum())}
    for group in pools(model.plan, "diff_pruning"):
        group = [step for step in group if step.name not in given]
        for step, (chosen, change) in zip(group, _kept(group, leaves), strict=True):
            given[step.name] = {"entries": chosen.shape[-1]}
            values[step.leaf("indices")] = chosen
            values[step.leaf("d")] = change.flatten(-2).gather(-1, chosen.to(change.device))
    for group in pools(model.plan, "s_bitfit"):
        group = [step for step in group if step.name not in given]
        for step, mask in zip(group, _open(group, leaves), strict=True):
            kept = (budget.moments if budget else {}).get(step.leaf("kept"), mask)
            given[step.name] = {"entries": int(kept.sum())}
            values[step.leaf("d")] = gate_value(leaves[step.leaf("alpha")]) * leaves[step.leaf("d")]
    for group in pools(model.plan, "prefix"):
        for step in group:
            if step.options.hidden and step.name not in given:
                op = step.site.compose(Computed(None), lambda leaf: leaves[leaf.name])
                assert isinstance(op, Prepend)
                given[step.name] = {"folded": 1}
                values[step.leaf("p")] = op.rows
    if given == model.plan.given:
        return model
    found = plan(model.base, list(model.plan.rules), model.plan.new, given=given)
    return rewrite(model.base, found, values=values)


def _kept(group: list[Step], leaves: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of every step of `diff_pruning`: the indices of the entries that change most, and all entries' change."""
    changes = [(gate_value(leaves[step.leaf("alpha")]) * leaves[step.leaf("d")]).detach() for step in group]
    indices = largest([step.entries for step in group], [change.abs() for change in changes])
    return list(zip(indices, changes, strict=True))


def _masks(group: list[Step], leaves: Mapping[str, Tensor]) -> list[Tensor]:
    """`_kept`, as masks of the entries."""
    return [
        torch.zeros(change.flatten(-2).shape, dtype=torch.bool).scatter(-1, chosen, True).view_as(change)
        for chosen, change in _kept(group, leaves)
    ]


def _open(group: list[Step], leaves: Mapping[str, Tensor]) -> list[Tensor]:
    """Of every step of `s_bitfit` a mask of its d, all or nothing: the most open gates stay, one at least."""
    masks = {step.name: torch.zeros(leaves[step.leaf("d")].shape, dtype=torch.bool) for step in group}
    room = group[0].options.density * sum(mask.numel() for mask in masks.values()) if group else 0
    for i, step in enumerate(sorted(group, key=lambda step: -leaves[step.leaf("alpha")].item())):
        mask = masks[step.name]
        if i == 0 or mask.numel() <= room:
            mask.fill_(True)
            room -= mask.numel()
    return list(masks.values())


def _tensors(model: GraphModel) -> dict[str, Tensor]:
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: value for name, value in named if name.startswith(PREFIX)}
