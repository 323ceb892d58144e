"""Fit: of each method the phi(W) that is nearest to a fully fine-tuned weight, min ||phi(W) - W*||. Eq. (2)"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic_core import PydanticUndefined
from torch import Tensor, nn

from .algebra import Dense, as_dense
from .errors import SpecError, SubspanError
from .graph.traced import TracedModel
from .plan import Plan, Site, plan
from .rewrite import rewrite
from .spec import Rule
from .svd import cached_svd
from .transforms import TRANSFORMS, AtMost, Leaf, entire, initial_value
from .tuned import TunedModel

UNCHANGED = 1e-6  # of a weight's norm
_ITERATIONS = 100  # of L-BFGS, from the method's start


@dataclass(frozen=True)
class Candidate:
    """A method with options, and the sites that it has; a weight with a side shorter than the rank has that rank."""

    name: str
    options: dict[str, Any]
    sites: dict[str, Site]


@dataclass
class Fitted:
    """What a candidate comes to.

    Attributes:
        errors: weight -> ||phi(W) - W*|| over ||W* - W||, in Frobenius' norm.
        parameters: weight -> tuned parameters there.
        values: leaf's name -> value.
    """

    errors: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """What full fine-tuning did.

    Attributes:
        matrices: weights of linear ops that changed, (W, W*) as (n, m).
        whole: other parameters that changed or are new, W*.
        left: tables and the like that changed and are not fitted, with the change's norm over the weight's.
    """

    matrices: dict[str, tuple[Tensor, Tensor]]
    whole: dict[str, Tensor]
    left: dict[str, float]


def change(traced: TracedModel, tuned: nn.Module, new: Sequence[str] = ()) -> Change:
    """How a fine-tuned model differs from its base.

    Args:
        traced: the base.
        tuned: a module with parameters of the same names.
        new: names of newly made parameters.

    Raises:
        SubspanError: a parameter is missing there, or of another shape.
    """
    there = dict(tuned.named_parameters(remove_duplicate=False))
    names = sorted(set(traced.aliases.values()) & traced.read())
    sites = {site.place: site for site in plan(traced, [Rule(target=names, apply=[entire().name])], tuple(new)).sites}
    matrices, whole, left = {}, {}, {}
    for name in names:
        before = as_dense(traced.get_parameter(name).detach())
        if name not in there or there[name].shape != before.shape:
            raise SubspanError(f"{name} is missing in the fine-tuned model, or of another shape: it is of another base")
        after, site = there[name].detach().to(before.dtype), sites[name]
        size = float((after - before).norm() / before.norm().clamp_min(1e-30))
        if name in new or (len(before.shape) < 2 and size > UNCHANGED):
            whole[name] = after
        elif size > UNCHANGED and site.linear and len(site.shape) == 2:
            matrices[name] = (site.part(before), site.part(after))
        elif size > UNCHANGED:
            left[name] = size
    return Change(matrices, whole, left)


def candidates(
    traced: TracedModel, weights: Sequence[str], methods: Sequence[str], ranks: Sequence[int]
) -> Iterator[tuple[Candidate | None, str]]:
    """Every method with every rank, once where it has none; or None with the reason why it can't be fitted here."""
    for name in methods:
        one = TRANSFORMS[name]
        needed = {key: info for key, info in one.options.model_fields.items() if info.default is PydanticUndefined}
        rank = [key for key, info in needed.items() if any(mark == AtMost(min) for mark in info.metadata)]
        if "matrix" not in one.on:
            yield None, f"{name}: stands on no weight"
            continue
        for given in [{rank[0]: size} for size in ranks] if rank else [{}]:
            said = f"{name}({', '.join(f'{key}={value}' for key, value in given.items())})" if given else name
            try:
                if other := needed.keys() - given:
                    raise SpecError(f"it has no default for {', '.join(sorted(other))}")
                found = plan(traced, _rules(traced, weights, name, given, rank))
                if not found.merges:
                    raise SpecError("what it makes is no plain weight")
                if any(site.schedules for site in found.sites):
                    raise SpecError("a schedule decides over the steps of a run")
                every = [leaf for site in found.sites for leaf in site.tuned]
                if len(every) > len(set(every)):
                    raise SpecError("sites share its tuned tensors")
                yield Candidate(name, given, {site.place: site for site in found.sites}), said
            except (SpecError, ValueError) as error:
                yield None, f"{said}: {str(error).splitlines()[0]}"


def _rules(
    traced: TracedModel, weights: Sequence[str], name: str, given: Mapping[str, int], ranks: Sequence[str]
) -> list[Rule]:
    """A method at every weight, with no larger rank than the weight's shorter side."""
    groups: dict[int, list[str]] = {}
    for weight in weights:
        most = min([*traced.get_parameter(weight).shape, *(given[key] for key in ranks)]) if ranks else 0
        groups.setdefault(most, []).append(weight)
    return [
        Rule(target=own, apply=[{name: {**given, **dict.fromkeys(ranks, most)}}])
        for most, own in sorted(groups.items(), reverse=True)
    ]


def fitted(site: Site, w: Tensor, target: Tensor, seed: int = 0) -> tuple[dict[str, Tensor], float]:
    """The values of a site's leaves for which ||phi(W) - W*|| is smallest, and that over ||W* - W||.

    Of W + A B it is the truncated singular value decomposition (doi 10.1007/BF02288367); else L-BFGS from the method's
    own start, which for what is not convex need not be the smallest.

    Args:
        w, target: W and W*, (n, m), float32 or wider.
    """
    made: dict[str, Tensor] = {}

    def lookup(leaf: Leaf) -> Tensor:
        if leaf.name not in made:
            value = initial_value(leaf, seed, lambda: cached_svd(w)).to(leaf.dtype or w.dtype).reshape(leaf.shape)
            made[leaf.name] = value.clone(memory_format=torch.contiguous_format).requires_grad_(leaf.role == "tuned")
        return made[leaf.name]

    def distance() -> Tensor:
        return (site.compose(Dense(w), lookup).dense() - target).norm()

    size, (one, _) = (target - w).norm(), site.chain[0]
    distance()
    if one.peft and one.peft.factors:
        u, s, vt = torch.linalg.svd(target - w, full_matrices=False)
        a, b = (made[f"{site.name}.{one.name}.{leaf}"] for leaf in one.peft.factors)
        root = s[: a.shape[1]].sqrt()
        with torch.no_grad():
            a.copy_(u[:, : len(root)] * root)
            b.copy_(root.unsqueeze(1) * vt[: len(root)])
    else:
        _descend([value for value in made.values() if value.requires_grad], lambda: (distance() / size).square())
    with torch.no_grad():
        return {name: value.detach() for name, value in made.items()}, float(distance() / size)


def _descend(values: list[Tensor], loss) -> None:
    optimiser = torch.optim.LBFGS(
        values, max_iter=_ITERATIONS, history_size=20, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        found = loss()
        found.backward(inputs=values)
        return found

    optimiser.step(closure)


def fit(one: Candidate, changed: Change) -> Fitted:
    """A candidate at every changed weight."""
    found = Fitted()
    for weight, (w, target) in changed.matrices.items():
        values, found.errors[weight] = fitted(one.sites[weight], w, target)
        found.values |= values
        found.parameters[weight] = one.sites[weight].parameters
    return found


def total_error(errors: Mapping[str, float], changed: Change) -> float:
    """||phi(W) - W*|| over ||W* - W||, of all weights together."""
    sizes = {weight: float((target - w).norm()) for weight, (w, target) in changed.matrices.items()}
    squares = sum((errors[weight] * size) ** 2 for weight, size in sizes.items())
    return (squares / sum(size**2 for size in sizes.values())) ** 0.5


def cheapest(found: Sequence[tuple[Candidate, Fitted]], changed: Change, error: float) -> dict[str, int]:
    """Weight -> the place of the candidate with fewest parameters whose error is at most `error`; the nearest where
    none is."""
    chosen = {}
    for weight in changed.matrices:
        order = sorted(range(len(found)), key=lambda i: (found[i][1].parameters[weight], found[i][1].errors[weight]))
        near = [i for i in order if found[i][1].errors[weight] <= error]
        chosen[weight] = near[0] if near else min(order, key=lambda i: found[i][1].errors[weight])
    return chosen


def as_tuned(
    traced: TracedModel,
    changed: Change,
    found: Sequence[tuple[Candidate, Fitted]],
    chosen: Mapping[str, int],
    new: Sequence[str] = (),
) -> TunedModel:
    """A tuned model with the chosen candidate at each weight, and whole what else changed."""
    groups: dict[str, tuple[dict, list[str]]] = {}
    for weight, place in chosen.items():
        one, options = found[place][0].sites[weight].chain[0]
        step = {one.name: options.model_dump(exclude_defaults=True)}
        groups.setdefault(repr(step), (step, []))[1].append(weight)
    rules = [Rule(target=sorted(weights), apply=[step]) for step, weights in groups.values()]
    if changed.whole:
        rules.append(Rule(target=sorted(changed.whole), apply=[entire().name]))
    planned: Plan = plan(traced, rules, tuple(new))
    values: dict[str, Tensor] = {}
    for site in planned.sites:
        if site.place in changed.whole:
            values[site.leaves[0].name] = site.layout.present(changed.whole[site.place]).dense()
        else:
            own = found[chosen[site.place]][1].values
            values |= {leaf.name: own[leaf.name] for leaf in site.leaves if leaf.role != "constant"}
    return rewrite(traced, planned, values=values)
