"""The plan: every site with its transform, shapes and counts, resolved on the meta device before a weight is loaded."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel
from torch import fx

from .algebra import Concat, Dense, Operator, Value
from .errors import SpecError
from .sites import Layout, find, layout_of, uneven
from .spec import Rule
from .trace import GraphModel
from .transforms import Leaf, Method, compose


@dataclass(frozen=True)
class Site:
    """One weight, or a slice of one, with the chain of transforms that a rule gives it.

    Attributes:
        weight: the parameter's name (the first, where tied).
        block: ("out" or "in", start, stop) of a slice, or None.
        shape: (..., n, m) of the site, in the orientation y = xW.
        layout: how the parameter is stored.
        chain: methods with options, first to last.
        leaves: the tensors that the chain declares: (name, shape, tuned).
        head: the weight is newly made; it does not count as trainable but as head.
        merges: phi(W) can be written back as a plain weight.
        rule: index of the rule.
    """

    weight: str
    block: tuple[str, int, int] | None
    shape: tuple[int, ...]
    layout: Layout
    chain: tuple[tuple[Method, BaseModel], ...]
    leaves: tuple[tuple[str, tuple[int, ...], bool], ...]
    head: bool
    merges: bool
    rule: int

    @property
    def name(self) -> str:
        """Prefix of the leaves: the weight's name, and the slice."""
        return self.weight + (".{}_{}_{}".format(*self.block) if self.block else "")

    @property
    def label(self) -> str:
        """For people: `weight[out 0:768]`."""
        return self.weight + ("[{} {}:{}]".format(*self.block) if self.block else "")

    @property
    def transform(self) -> str:
        """The chain in words, e.g. `ssb, lora(rank=8, alpha=16)`."""
        return ", ".join(
            method.name + (f"({', '.join(f'{k}={v:g}' for k, v in given.items())})" if given else "")
            for method, options in self.chain
            if (given := {k: v for k, v in options.model_dump(exclude_none=True, exclude_defaults=True).items()})
            is not None
        )

    @property
    def parameters(self) -> int:
        """Tuned parameters."""
        return sum(torch.Size(shape).numel() for _, shape, tuned in self.leaves if tuned)


@dataclass(frozen=True)
class Plan:
    """All sites of a model.

    Attributes:
        sites: in the model's own order of parameters.
        total_parameters: of the model before the rewrite, a newly made head included; tied weights count once.
        warnings: what is probably not meant.
        notes: what is good to know.
        rules: the rules that were resolved.
        new: names of the model's newly made parameters.
    """

    sites: tuple[Site, ...]
    total_parameters: int
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = field(default=(), repr=False)
    new: tuple[str, ...] = field(default=(), repr=False)

    @property
    def trainable_parameters(self) -> int:
        """Tuned parameters, newly made heads apart."""
        return sum(site.parameters for site in self.sites if not site.head)

    @property
    def head_parameters(self) -> int:
        """Tuned parameters of newly made heads."""
        return sum(site.parameters for site in self.sites if site.head)

    @property
    def share(self) -> float:
        """Trainable in thousandths of all parameters."""
        return 1000 * self.trainable_parameters / self.total_parameters

    def by_weight(self) -> dict[str, list[Site]]:
        """Sites of each weight, slices in order."""
        groups: dict[str, list[Site]] = {}
        for site in self.sites:
            groups.setdefault(site.weight, []).append(site)
        return {weight: sorted(sites, key=lambda s: s.block or ()) for weight, sites in groups.items()}

    def to_dict(self) -> dict[str, Any]:
        """As written to plan.json."""
        return {
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
            "head_parameters": self.head_parameters,
            "trainable_thousandths": round(self.share, 4),
            "merges": all(site.merges for site in self.sites),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "sites": [
                {
                    "site": site.label,
                    "weight": site.weight,
                    "transform": site.transform,
                    "shape": list(site.shape),
                    "parameters": site.parameters,
                    "head": site.head,
                    "merges": site.merges,
                    "rule": site.rule,
                }
                for site in self.sites
            ],
        }


def uses(graph: fx.Graph, names: Iterable[str]) -> list[tuple[fx.Node, fx.Node]]:
    """(get_attr node, reading node) for a parameter under any of its names, in the graph's order."""
    wanted = set(names)
    order = {node: i for i, node in enumerate(graph.nodes)}
    pairs = [(node, user) for node in graph.find_nodes(op="get_attr") if node.target in wanted for user in node.users]
    return sorted(pairs, key=lambda pair: order[pair[1]])


def plan(model: GraphModel, rules: list[Rule], new: Iterable[str] = (), strict: bool = False) -> Plan:
    """Resolve rules against a traced model. Shapes alone are read, so the model may be on the meta device.

    Args:
        model: the traced model.
        rules: as in a spec.
        new: names of newly made parameters (heads).
        strict: warnings are errors.

    Raises:
        SpecError: at the rule's place: nothing matched, two rules on one weight, a slice out of range, a rank larger
            than the matrix, a method that can't stand where it does, and with `strict` an uneven match.
    """
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False) if name in model.aliases}
    names, graph = list(model.aliases), model.graphs["eval"]
    new = {model.aliases[name] for name in new}
    used = {node.target for node in graph.find_nodes(op="get_attr")}
    sites: list[Site] = []
    warnings: list[str] = []
    notes: list[str] = []
    for r, rule in enumerate(rules):
        path = ("rules", r, "target")
        hits = find(rule.targets, names, path)
        found = [f"rules[{r}]: {sentence}" for sentence in uneven(rule.targets, hits, names)]
        if found and strict:
            raise SpecError(f"uneven match: {found[0].partition(': ')[2]}", path)
        warnings += found
        for weight in dict.fromkeys(model.aliases[name] for name in hits):
            aliases = model.tied.get(weight, [weight])
            if not used.intersection(aliases):
                warnings.append(f"rules[{r}]: {weight} is not used by the model's forward; it is left out")
                continue
            if len(aliases) > 1:
                notes.append(
                    f"{' = '.join(aliases)} are tied: every use sees the transform and the merge keeps the tie"
                )
            layout = layout_of(tuple(shapes[weight]), uses(graph, aliases))
            site = _site(weight, layout, rule, r, weight in new)
            _check_overlap(site, sites)
            sites.append(site)
    tuned = {site.weight for site in sites}
    warnings += [f"{name} is newly made and no rule tunes it: it stays random" for name in sorted(new - tuned)]
    warnings += [
        f"{s.label}: {s.transform} can't merge into a plain weight, so it can't be exported"
        for s in sites
        if not s.merges
    ]
    if strict and warnings:
        raise SpecError(warnings[0], ("rules",))
    order = {name: i for i, name in enumerate(names)}
    unique = {weight: shapes[weight] for weight in model.aliases.values()}
    total = sum(torch.Size(shape).numel() for shape in unique.values())
    sites.sort(key=lambda site: (order[site.weight], site.block or ()))
    return Plan(tuple(sites), total, tuple(warnings), tuple(dict.fromkeys(notes)), tuple(rules), tuple(sorted(new)))


def _site(weight: str, layout: Layout, rule: Rule, r: int, head: bool) -> Site:
    block, shape = None, layout.shape
    if rule.slice:
        axis, (start, stop) = rule.slice.axis, rule.slice.bounds
        size = shape[-1] if axis == "out" else shape[-2]
        if stop > size:
            raise SpecError(
                f"{weight} has {size} {axis}puts, so [{start}, {stop}] is out of range", ("rules", r, "slice")
            )
        block = (axis, start, stop)
        shape = (*shape[:-1], stop - start) if axis == "out" else (*shape[:-2], stop - start, shape[-1])
    for j, (method, options) in enumerate(rule.chain):
        path = ("rules", r, "apply", j, method.name)
        _check_kind(weight, layout, method, path)
        rank = getattr(options, "rank", 0)
        if rank > min(shape[-2:]):
            raise SpecError(
                f"rank {rank} is larger than {weight} allows: it is {shape[-2]} x {shape[-1]}", (*path, "rank")
            )
    leaves: dict[str, tuple[str, tuple[int, ...], bool]] = {}

    def lookup(leaf: Leaf) -> torch.Tensor:
        leaves[leaf.name] = (leaf.name, leaf.shape, leaf.tuned)
        return torch.empty(leaf.shape, device="meta")

    site = Site(weight, block, shape, layout, tuple(rule.chain), (), head, True, r)
    try:
        op = compose(list(site.chain), Dense(torch.empty(shape, device="meta")), shape, lookup, site.name)
    except SpecError as error:
        raise SpecError(error.message, ("rules", r, "apply")) from None
    try:
        merges = tuple(op.dense().shape) == tuple(shape)
    except NotImplementedError:
        merges = False
    return Site(weight, block, shape, layout, site.chain, tuple(leaves.values()), head, merges, r)


def _check_kind(weight: str, layout: Layout, method: Method, path: tuple[str | int, ...]) -> None:
    if layout.vector and method.vectors is False:
        raise SpecError(
            f"{method.name} needs a matrix, but the target matches the vector {weight}; use full or bitfit", path
        )
    if not layout.vector and method.vectors is True:
        raise SpecError(f"{method.name} tunes vectors (biases), but the target matches the matrix {weight}", path)


def _check_overlap(site: Site, others: list[Site]) -> None:
    for other in others:
        if other.weight != site.weight:
            continue
        path = ("rules", site.rule, "target")
        if not (site.block and other.block):
            raise SpecError(
                f"{site.weight} is already transformed by rules[{other.rule}]; a chain in `apply` composes", path
            )
        if site.block[0] != other.block[0]:
            raise SpecError(f"{site.weight} is already sliced along the other axis by rules[{other.rule}]", path)
        if site.block[1] < other.block[2] and other.block[1] < site.block[2]:
            raise SpecError(f"{site.label} overlaps with {other.label} of rules[{other.rule}]", path)


def transformed(sites: list[Site], stored: Value, lookup: Callable[[Site, Leaf], Value]) -> Operator:
    """phi(W) of one whole weight as an operator, its slices put together.

    Args:
        sites: all sites of the weight, slices in order.
        stored: the parameter's value, a tensor or a proxy.
        lookup: (site, leaf) -> value.
    """
    layout = sites[0].layout
    w = layout.present(stored)
    if sites[0].block is None:
        return _compose(sites[0], w, lookup)
    axis = sites[0].block[0]
    size = layout.shape[-1] if axis == "out" else layout.shape[-2]
    blocks: list[Operator] = []
    sizes: list[int] = []
    position = 0
    for site in sites:
        _, start, stop = site.block
        if start > position:
            blocks.append(_narrow(w, axis, position, start))
            sizes.append(start - position)
        blocks.append(_compose(site, _narrow(w, axis, start, stop), lookup))
        sizes.append(stop - start)
        position = stop
    if position < size:
        blocks.append(_narrow(w, axis, position, size))
        sizes.append(size - position)
    return Concat(tuple(blocks), tuple(sizes), axis)


def _compose(site: Site, w: Dense, lookup: Callable[[Site, Leaf], Value]) -> Operator:
    return compose(list(site.chain), w, site.shape, lambda leaf: lookup(site, leaf), site.name)


def _narrow(w: Dense, axis: str, start: int, stop: int) -> Dense:
    dim = -1 if (axis == "out") != w.transposed else -2
    return Dense(w.stored.narrow(dim, start, stop - start), w.transposed)
