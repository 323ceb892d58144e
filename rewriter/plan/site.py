"""Sites and the plan: every place that is transformed, with its shapes and counts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from ..algebra import Concat, Dense, Operator
from ..graph.weights import Layout
from ..spec.models import Rule
from ..transforms import Leaf, Schedule, Transform, compose

PARAMETERS = {"matrix", "vector", "cross_attention"}
Given = Mapping[str, Mapping[str, int]]
Block = tuple[str, int, int]


@dataclass(frozen=True)
class Site:
    """One place in the traced graph, with the chain of transforms that a rule gives it.

    Attributes:
        kind: one of `KINDS`: a parameter (matrix, vector), or a place inside a module.
        place: the parameter's name (the first, where tied), or the module's.
        block: ("out" or "in", start, stop) of a slice of a parameter, or None.
        shape: (..., n, m) of the site, in the orientation y = xW.
        layout: how the parameter is stored; None for a place inside a module.
        chain: transforms with options, first to last.
        leaves: the tensors that the chain declares, in the order in which it does.
        schedules: (name of a transform at this site, schedule), in the order in which the chain declares them.
        head: the parameter is newly made; it does not count as trainable but as head.
        merges: phi(W) can be written back as a plain weight.
        linear: every op that reads the parameter is a product with it.
        rows: how many rows the chain puts before the sequence.
        moves: how many positions these take in the model's tables of positions.
        rule: index of the rule.
        given: `<name>.<transform>` -> sizes that a schedule has settled.
    """

    kind: str
    place: str
    block: Block | None
    shape: tuple[int, ...]
    layout: Layout | None
    chain: tuple[tuple[Transform, BaseModel], ...]
    leaves: tuple[Leaf, ...] = ()
    schedules: tuple[tuple[str, Schedule], ...] = ()
    head: bool = False
    merges: bool = False
    linear: bool = False
    rows: int = 0
    moves: int = 0
    rule: int = 0
    given: Given = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """Prefix of the leaves: the parameter's name and the slice, or the module's name and the kind."""
        return name_of(self.kind, self.place, self.block)

    @property
    def label(self) -> str:
        """For people: `weight[out 0:768]`, `layer.0[feed_forward]`."""
        return label_of(self.kind, self.place, self.block)

    @property
    def transform(self) -> str:
        """The chain in words, e.g. `ssb, lora(rank=8, alpha=16)`."""
        return ", ".join(
            one.name + (f"({', '.join(f'{k}={_word(v)}' for k, v in given.items())})" if given else "")
            for one, options in self.chain
            if (given := {k: v for k, v in options.model_dump(exclude_defaults=True).items()}) is not None
        )

    @property
    def classes(self) -> str:
        """The classes of its transforms: reconstruction, extension, combination."""
        return ", ".join(dict.fromkeys(one.kind for one, _ in self.chain))

    @property
    def replaces(self) -> bool:
        """Whether nothing of the parameter is left in phi(W): a leaf stands in its place."""
        return self.block is None and any(leaf.replaces for leaf in self.leaves)

    @property
    def parameters(self) -> int:
        """Tuned parameters."""
        return sum(self.tuned.values())

    @property
    def tuned(self) -> dict[str, int]:
        """Tuned tensors: name -> entries."""
        return {leaf.name: torch.Size(leaf.shape).numel() for leaf in self.leaves if leaf.role == "tuned"}

    def part(self, stored: Tensor) -> Tensor:
        """This site's (..., n, m) of a tensor that is stored as its parameter is."""
        w = self.layout.present(stored).dense()
        if self.block is None:
            return w
        axis, start, stop = self.block
        return w.narrow(-1 if axis == "out" else -2, start, stop - start)

    def compose(
        self,
        w: Operator,
        lookup: Callable[[Leaf], Tensor],
        training: bool = False,
        penalties: list[tuple[str, Tensor]] | None = None,
    ) -> Operator:
        """The chain on an operator; arguments as of `transforms.compose`."""
        return compose(self.chain, w, self.shape, lookup, self.name, self.kind, self.given, training, penalties)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def name_of(kind: str, place: str, block: Block | None) -> str:
    """The prefix of a site's leaves; arguments as of `Site`."""
    if kind not in PARAMETERS:
        return f"{place}.{kind}".lstrip(".")
    return place + (".{}_{}_{}".format(*block) if block else "")


def label_of(kind: str, place: str, block: Block | None) -> str:
    """A site in a message; arguments as of `Site`."""
    if kind not in PARAMETERS:
        return f"{place}[{kind}]"
    return place + ("[{} {}:{}]".format(*block) if block else "")


@dataclass(frozen=True)
class Plan:
    """All sites of a model.

    Attributes:
        sites: in the model's own order of parameters.
        total_parameters: of the model before the rewrite, a newly made head included; tied weights count once.
        weight_bytes: that they take, as they are stored.
        warnings: what is probably not meant.
        notes: what is good to know.
        rules: the rules that were resolved.
        new: names of the model's newly made parameters.
    """

    sites: tuple[Site, ...]
    total_parameters: int
    weight_bytes: int = 0
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = field(default=(), repr=False)
    new: tuple[str, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        tuned = f"{self.trainable_parameters:,} tuned parameters of {self.total_parameters:,}"
        return f"<Plan: {len(self.sites)} sites, {tuned}, {self.head_parameters:,} in new heads>"

    @property
    def given(self) -> dict[str, dict[str, int]]:
        """Sizes that tuning has settled, of all sites."""
        return {step: dict(sizes) for site in self.sites for step, sizes in site.given.items()}

    @property
    def rows(self) -> int:
        """How many rows are put before the token embeddings."""
        return sum(site.rows for site in self.sites if site.kind == "embeddings")

    @property
    def moves(self) -> int:
        """By how many positions the tokens are moved on by what stands before keys and values."""
        return max((site.moves for site in self.sites), default=0)

    @property
    def merges(self) -> bool:
        """Whether every site merges into a plain weight."""
        return all(site.merges for site in self.sites)

    @property
    def trainable_parameters(self) -> int:
        """Tuned parameters, newly made heads apart; a tensor that sites share counts once."""
        return sum({name: n for site in self.sites if not site.head for name, n in site.tuned.items()}.values())

    @property
    def head_parameters(self) -> int:
        """Tuned parameters of newly made heads."""
        return sum(site.parameters for site in self.sites if site.head)

    @property
    def share(self) -> float:
        """Trainable in thousandths of all parameters."""
        return 1000 * self.trainable_parameters / self.total_parameters

    def by_weight(self) -> dict[str, list[Site]]:
        """Sites of each parameter, slices in order."""
        groups: dict[str, list[Site]] = {}
        for site in self.sites:
            if site.layout is not None:
                groups.setdefault(site.place, []).append(site)
        return {weight: sorted(sites, key=lambda s: s.block or ()) for weight, sites in groups.items()}

    def by_rule(self) -> dict[int, list[Site]]:
        """Sites of each rule, rules in order."""
        return {
            rule: [site for site in self.sites if site.rule == rule] for rule in sorted({s.rule for s in self.sites})
        }

    def to_dict(self) -> dict[str, Any]:
        """As written to plan.json."""
        return {
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
            "weight_bytes": self.weight_bytes,
            "head_parameters": self.head_parameters,
            "trainable_thousandths": round(self.share, 4),
            "merges": self.merges,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "sites": [
                {
                    "site": site.label,
                    "kind": site.kind,
                    "weight": site.place if site.layout else None,
                    "transform": site.transform,
                    "class": site.classes,
                    "shape": list(site.shape),
                    "parameters": site.parameters,
                    "settled": {step: dict(sizes) for step, sizes in site.given.items()},
                    "head": site.head,
                    "merges": site.merges,
                    "rule": site.rule,
                }
                for site in self.sites
            ],
        }


def transformed(
    sites: list[Site],
    stored: Tensor,
    lookup: Callable[[Site, Leaf], Tensor],
    training: bool = False,
    penalties: list[tuple[str, Tensor]] | None = None,
) -> Operator:
    """phi(W) of one whole parameter as an operator, its slices put together.

    Args:
        sites: all sites of the parameter, slices in order.
        stored: the parameter's value.
        lookup: (site, leaf) -> value.
        training: for the train graph.
        penalties: filled with the sites' penalties.
    """

    def composed(site: Site, w: Dense) -> Operator:
        return site.compose(w, lambda leaf: lookup(site, leaf), training, penalties)

    layout = sites[0].layout
    w = layout.present(stored)
    if sites[0].block is None:
        return composed(sites[0], w)
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
        blocks.append(composed(site, _narrow(w, axis, start, stop)))
        sizes.append(stop - start)
        position = stop
    if position < size:
        blocks.append(_narrow(w, axis, position, size))
        sizes.append(size - position)
    return Concat(tuple(blocks), tuple(sizes), axis)


def _narrow(w: Dense, axis: str, start: int, stop: int) -> Dense:
    dim = -1 if (axis == "out") != w.transposed else -2
    return Dense(w.stored.narrow(dim, start, stop - start), w.transposed)
