"""The plan: every site with its transform, shapes and counts, resolved on the meta device before a weight is loaded."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import BaseModel
from torch import fx

from .algebra import Computed, Concat, Dense, Operator, Value
from .errors import SpecError, raise_all
from .sites import Layout, factored, find, layout_of, match, uneven
from .spec import Rule
from .sublayers import attentions, call_of, embeddings, modules, paths, shape_of, sublayers
from .trace import GraphModel
from .transforms import KINDS, Leaf, Method, compose

Given = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Site:
    """One place in the traced graph, with the chain of transforms that a rule gives it.

    Attributes:
        kind: one of `transforms.KINDS`: a parameter (matrix, vector), or a place inside a module.
        place: the parameter's name (the first, where tied), or the module's.
        block: ("out" or "in", start, stop) of a slice of a parameter, or None.
        shape: (..., n, m) of the site, in the orientation y = xW.
        layout: how the parameter is stored; None for a place inside a module.
        chain: methods with options, first to last.
        leaves: the tensors that the chain declares.
        head: the parameter is newly made; it does not count as trainable but as head.
        merges: phi(W) can be written back as a plain weight.
        linear: every op that reads the parameter is a product with it.
        rule: index of the rule.
        given: `<name>.<method>` -> sizes that tuning has settled.
    """

    kind: str
    place: str
    block: tuple[str, int, int] | None
    shape: tuple[int, ...]
    layout: Layout | None
    chain: tuple[tuple[Method, BaseModel], ...]
    leaves: tuple[Leaf, ...] = ()
    head: bool = False
    merges: bool = False
    linear: bool = False
    rule: int = 0
    given: Given = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """Prefix of the leaves: the parameter's name and the slice, or the module's name and the kind."""
        if self.layout is None:
            return f"{self.place}.{self.kind}".lstrip(".")
        return self.place + (".{}_{}_{}".format(*self.block) if self.block else "")

    @property
    def label(self) -> str:
        """For people: `weight[out 0:768]`, `layer.0[feed_forward]`."""
        if self.layout is None:
            return f"{self.place}[{self.kind}]"
        return self.place + ("[{} {}:{}]".format(*self.block) if self.block else "")

    @property
    def transform(self) -> str:
        """The chain in words, e.g. `ssb, lora(rank=8, alpha=16)`."""
        return ", ".join(
            method.name + (f"({', '.join(f'{k}={_word(v)}' for k, v in given.items())})" if given else "")
            for method, options in self.chain
            if (given := {k: v for k, v in options.model_dump(exclude_defaults=True).items()}) is not None
        )

    @property
    def classes(self) -> str:
        """The classes of its methods: reconstruction, extension, combination."""
        return ", ".join(dict.fromkeys(method.kind for method, _ in self.chain))

    @property
    def parameters(self) -> int:
        """Tuned parameters."""
        return sum(self.tuned.values())

    @property
    def tuned(self) -> dict[str, int]:
        """Tuned tensors: name -> entries."""
        return {leaf.name: torch.Size(leaf.shape).numel() for leaf in self.leaves if leaf.role == "tuned"}

    def part(self, stored: torch.Tensor) -> torch.Tensor:
        """This site's (..., n, m) of a tensor that is stored as its parameter is."""
        w = self.layout.present(stored).dense()
        if self.block is None:
            return w
        axis, start, stop = self.block
        return w.narrow(-1 if axis == "out" else -2, start, stop - start)

    def compose(
        self,
        w: Operator,
        lookup: Callable[[Leaf], Value],
        training: bool = False,
        penalties: list[tuple[str, Value]] | None = None,
    ) -> Operator:
        """The chain on an operator; arguments as of `transforms.compose`."""
        return compose(list(self.chain), w, self.shape, lookup, self.name, self.kind, self.given, training, penalties)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


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
    def given(self) -> dict[str, dict[str, int]]:
        """Sizes that tuning has settled, of all sites."""
        return {step: dict(sizes) for site in self.sites for step, sizes in site.given.items()}

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


def uses(graph: fx.Graph, names: Iterable[str]) -> list[tuple[fx.Node, fx.Node]]:
    """(get_attr node, reading node) for a parameter under any of its names, in the graph's order."""
    wanted = set(names)
    order = {node: i for i, node in enumerate(graph.nodes)}
    pairs = [(node, user) for node in graph.find_nodes(op="get_attr") if node.target in wanted for user in node.users]
    return sorted(pairs, key=lambda pair: order[pair[1]])


def plan(
    model: GraphModel, rules: list[Rule], new: Iterable[str] = (), strict: bool = False, given: Given | None = None
) -> Plan:
    """Resolve rules against a traced model. Shapes alone are read, so the model may be on the meta device.

    Args:
        model: the traced model.
        rules: as in a spec.
        new: names of newly made parameters (heads).
        strict: warnings are errors.
        given: `<site>.<method>` -> sizes that tuning has settled, from an adapter.

    Raises:
        SpecError: at the rule's place: nothing matched, two rules on one place, a slice out of range, a rank larger
            than the matrix, a method that can't stand where it does, and with `strict` an uneven match.
    """
    names, graph = list(model.aliases), model.graphs["eval"]
    new = {model.aliases[name] for name in new}
    found = _Found(model, graph, new, given or {})
    mistakes = []
    for r, rule in enumerate(rules):
        try:
            found.add(r, rule, strict)
        except SpecError as error:
            mistakes.append(error)
    raise_all(mistakes)
    sites, warnings = found.sites, found.warnings
    tuned = {site.place for site in sites if site.layout}
    warnings += [f"{name} is newly made and no rule tunes it: it stays random" for name in sorted(new - tuned)]
    stay: dict[str, int] = {}
    for site in sites:
        if not site.merges:
            stay[site.transform] = stay.get(site.transform, 0) + 1
    found.notes += [
        f"{transform} can't merge into a plain weight ({count} sites): no merged checkpoint; it stays in the ONNX graph"
        for transform, count in stay.items()
    ]
    if strict and warnings:
        raise SpecError(warnings[0], ("rules",))
    order = {name: i for i, name in enumerate([*names, *found.modules])}
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    total = sum(torch.Size(shapes[weight]).numel() for weight in dict.fromkeys(model.aliases.values()))
    sites.sort(key=lambda site: (site.layout is None, order[site.place], KINDS.index(site.kind), site.block or ()))
    return Plan(
        tuple(sites), total, tuple(warnings), tuple(dict.fromkeys(found.notes)), tuple(rules), tuple(sorted(new))
    )


class _Found:
    """The sites of the rules so far."""

    def __init__(self, model: GraphModel, graph: fx.Graph, new: set[str], given: Given):
        self.model, self.graph, self.new, self.given = model, graph, new, given
        self.parameters = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
        self.modules = modules(graph)
        self.crossing = {one.module for one in attentions(graph) if one.cross}
        self.used = {node.target for node in graph.find_nodes(op="get_attr")}
        self.sites: list[Site] = []
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def add(self, r: int, rule: Rule, strict: bool) -> None:
        """Resolve one rule."""
        kinds = set(KINDS).intersection(*(method.on for method, _ in rule.chain))
        if not kinds:
            chain = ", ".join(f"{method.name} ({', '.join(method.on)})" for method, _ in rule.chain)
            raise SpecError(f"these methods have no kind of place in common: {chain}", ("rules", r, "apply"))
        path, inside = ("rules", r, "target"), kinds - PARAMETERS
        names, where = list(self.model.aliases), "parameter"
        if inside and not (kinds & PARAMETERS and _hits(rule.targets, names)):
            names, where = self.modules, "module"
        if rule.slice and where == "module":
            raise SpecError("a slice is of a parameter, but this rule targets modules", ("rules", r, "slice"))
        hits = find(rule.targets, names, path, where)
        uneven_hits = [f"rules[{r}]: {sentence}" for sentence in uneven(rule.targets, hits, names)]
        if uneven_hits and strict:
            raise SpecError(f"uneven match: {uneven_hits[0].partition(': ')[2]}", path)
        self.warnings += uneven_hits if where == "parameter" else []
        before = len(self.sites)
        if where == "module":
            self.add_modules(r, rule, hits, inside)
        else:
            for weight in dict.fromkeys(self.model.aliases[name] for name in hits):
                self.add_parameter(r, rule, weight)
        if len(self.sites) == before and where == "module":
            wanted = " or ".join(sorted(inside))
            raise SpecError(f"no {wanted} in {', '.join(hits[:3])}; {_HINT.get(min(inside), '')}", path)

    def add_parameter(self, r: int, rule: Rule, weight: str) -> None:
        aliases = self.model.tied.get(weight, [weight])
        if not self.used.intersection(aliases):
            self.warnings.append(f"rules[{r}]: {weight} is not used by the model's forward; it is left out")
            return
        if len(aliases) > 1:
            self.notes.append(
                f"{' = '.join(aliases)} are tied: every use sees the transform and the merge keeps the tie"
            )
        readers = uses(self.graph, aliases)
        layout = layout_of(self.parameters[weight], readers)
        crossing = any(weight.startswith(f"{module}.") for module in self.crossing)
        kind = "vector" if layout.vector else "matrix"
        for j, (method, _) in enumerate(rule.chain):
            _check_kind(weight, kind, crossing, method, ("rules", r, "apply", j, method.name))
        shape, block = layout.shape, None
        if rule.slice:
            block, shape = _cut(rule, r, weight, layout)
        site = self.resolve(
            Site(kind, weight, block, shape, layout, tuple(rule.chain), head=weight in self.new, rule=r)
        )
        formed = [user for node, user in readers if factored(user, node, layout) is None]
        if not site.merges and (formed or block):
            what = "a slice" if block else str(formed[0].target)
            raise SpecError(
                f"{site.transform} has no matrix to form, but {weight} is read by {what}; it works on linear layers",
                ("rules", r, "target"),
            )
        _check_overlap(site, self.sites)
        self.sites.append(replace(site, linear=kind == "matrix" and not formed))

    def add_modules(self, r: int, rule: Rule, hits: list[str], kinds: set[str]) -> None:
        hits = [hit for hit in hits if not any(hit.startswith(f"{other}.") for other in hits)]
        counts: dict[str, list[str]] = {}
        for module in hits:
            found = list(places(self.graph, module, kinds))
            for kind in kinds:
                if not any(one == kind for one, _, _ in found):
                    counts.setdefault(kind, []).append(module)
            for kind, place, shape in found:
                site = self.resolve(Site(kind, place, None, shape, None, tuple(rule.chain), rule=r))
                if any((one.kind, one.place) == (kind, place) for one in self.sites):
                    raise SpecError(
                        f"{site.label} is transformed twice; a chain in `apply` composes", ("rules", r, "target")
                    )
                self.sites.append(site)
        names = ", ".join(method.name for method, _ in rule.chain)
        for kind, lacking in counts.items():
            among = "as in others that match" if len(lacking) < len(hits) else f"so {names} stands on less than it can"
            self.warnings.append(f"rules[{r}]: no {kind} in {', '.join(lacking[:3])}, {among}")

    def resolve(self, site: Site) -> Site:
        """A site with its leaves, and whether it merges."""
        for j, (_, options) in enumerate(site.chain):
            rank = getattr(options, "rank", 0)
            if rank > min(site.shape[-2:]):
                raise SpecError(
                    f"rank {rank} is larger than {site.label} allows: it is {site.shape[-2]} x {site.shape[-1]}",
                    ("rules", site.rule, "apply", j, site.chain[j][0].name, "rank"),
                )
        steps = {step: sizes for step, sizes in self.given.items() if step.rpartition(".")[0] == site.name}
        site = replace(site, given=steps)
        leaves: dict[str, Leaf] = {}

        def lookup(leaf: Leaf) -> torch.Tensor:
            leaves[leaf.name] = replace(leaf, initial=0.0)
            return torch.empty(leaf.shape, device="meta", dtype=torch.int64 if leaf.role == "chosen" else None)

        w = torch.empty(site.shape, device="meta")
        try:
            op = site.compose(Dense(w) if site.layout else Computed(w), lookup)
        except SpecError as error:
            raise SpecError(error.message, ("rules", site.rule, "apply")) from None
        except NotImplementedError:
            chain = ", ".join(method.name for method, _ in site.chain)
            raise SpecError(
                f"{chain}: a method needs a matrix, but the one before is none", ("rules", site.rule, "apply")
            ) from None
        try:
            merges = site.layout is not None and tuple(op.dense().shape) == tuple(site.shape)
        except NotImplementedError:
            merges = False
        return replace(site, leaves=tuple(leaves.values()), merges=merges)


PARAMETERS = {"matrix", "vector", "cross_attention"}
_HINT = {
    "attention": "target layers, e.g. encoder.layer.*",
    "feed_forward": "target layers, e.g. encoder.layer.*",
    "keys": "target layers or attention modules",
    "embeddings": "target the module that reads the token ids",
}


def _hits(patterns: list[str], names: list[str]) -> bool:
    try:
        return bool(match(patterns, names))
    except ValueError:
        return False


def places(graph: fx.Graph, module: str, kinds: Iterable[str]) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """(kind, place, shape (n, m)) of what is in a module: sublayers, keys and values, embeddings of tokens.

    Of several attention sublayers (self and cross) the first one counts; a module that is called again has its places
    once.

    Raises:
        SpecError: a module holds several layers.
    """
    wanted = set(kinds)
    if wanted & {"attention", "feed_forward"}:
        calls = sublayers(graph, module)
        if any(sum(one.kind == "feed_forward" for one in call) > 1 for call in calls):
            raise SpecError(f"{module} holds several layers; target each of them, e.g. {module}.layer.*")
        first = {one.kind: one for call in calls for one in reversed(call)}
        for kind in sorted(wanted & first.keys()):
            yield kind, module, (shape_of(first[kind].input)[-1], shape_of(first[kind].output)[-1])
    if wanted & {"keys", "values"}:
        once = {}
        for one in attentions(graph, module):
            if once.setdefault(one.module, call_of(one.node)) != call_of(one.node):
                continue
            for kind in ("keys", "values"):
                if kind in wanted:
                    yield kind, one.module, (one.width(kind), one.width(kind))
    if "embeddings" in wanted:
        for node in embeddings(graph, module):
            yield "embeddings", paths(node)[-1], tuple(map(int, shape_of(node.args[0])))


def _cut(rule: Rule, r: int, weight: str, layout: Layout) -> tuple[tuple[str, int, int], tuple[int, ...]]:
    """The block and the shape of a slice."""
    axis, (start, stop) = rule.slice.axis, rule.slice.bounds
    shape = layout.shape
    size = shape[-1] if axis == "out" else shape[-2]
    if stop > size:
        raise SpecError(f"{weight} has {size} {axis}puts, so [{start}, {stop}] is out of range", ("rules", r, "slice"))
    shape = (*shape[:-1], stop - start) if axis == "out" else (*shape[:-2], stop - start, shape[-1])
    return (axis, start, stop), shape


def _check_kind(weight: str, kind: str, crossing: bool, method: Method, path: tuple[str | int, ...]) -> None:
    if kind in method.on or (crossing and kind == "matrix" and "cross_attention" in method.on):
        return
    if kind == "vector":
        message = f"{method.name} needs a matrix, but the target matches the vector {weight}; use full or bitfit"
    elif "cross_attention" in method.on:
        message = f"{method.name} is for weights of cross-attention, but the target matches {weight}"
    else:
        message = f"{method.name} tunes vectors (biases), but the target matches the matrix {weight}"
    raise SpecError(message, path)


def _check_overlap(site: Site, others: list[Site]) -> None:
    for other in others:
        if other.layout is None or other.place != site.place:
            continue
        path = ("rules", site.rule, "target")
        if not (site.block and other.block):
            raise SpecError(
                f"{site.place} is already transformed by rules[{other.rule}]; a chain in `apply` composes", path
            )
        if site.block[0] != other.block[0]:
            raise SpecError(f"{site.place} is already sliced along the other axis by rules[{other.rule}]", path)
        if site.block[1] < other.block[2] and other.block[1] < site.block[2]:
            raise SpecError(f"{site.label} overlaps with {other.label} of rules[{other.rule}]", path)


def transformed(
    sites: list[Site],
    stored: Value,
    lookup: Callable[[Site, Leaf], Value],
    training: bool = False,
    penalties: list[tuple[str, Value]] | None = None,
) -> Operator:
    """phi(W) of one whole parameter as an operator, its slices put together.

    Args:
        sites: all sites of the parameter, slices in order.
        stored: the parameter's value, a tensor or a proxy.
        lookup: (site, leaf) -> value.
        training: lower for the train graph.
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
