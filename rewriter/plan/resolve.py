"""Resolve: the rules of a spec against a traced model, to a plan of complete sites. Shapes alone are read."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from pydantic import BaseModel
from torch import Tensor, fx

from ..algebra import Computed, Dense, Operator, rows_of
from ..errors import SpecError, raise_all, reason
from ..graph.globs import find, match, uneven
from ..graph.sublayers import attentions, call_of, embeddings, modules, paths, shape_of, sublayers
from ..graph.traced import TracedModel
from ..graph.weights import Layout, factored, layout_of, uses
from ..spec.models import Rule
from ..transforms import KINDS, TRANSFORMS, AtMost, Leaf, Schedule, Transform, compose
from .site import PARAMETERS, Block, Given, Plan, Site, label_of, name_of

_HINT = {
    "attention": "target layers, e.g. encoder.layer.*",
    "feed_forward": "target layers, e.g. encoder.layer.*",
    "keys": "target layers or attention modules",
    "embeddings": "target the module that reads the token ids",
}


def plan(
    model: TracedModel, rules: list[Rule], new: Iterable[str] = (), strict: bool = False, given: Given | None = None
) -> Plan:
    """Resolve rules against a traced model. Shapes alone are read, so the model may be on the meta device.

    Args:
        model: the traced model.
        rules: as in a spec.
        new: names of newly made parameters (heads).
        strict: warnings are errors.
        given: `<site>.<transform>` -> sizes that a schedule has settled, from an adapter.

    Raises:
        SpecError: at the rule's place: nothing matched, two rules on one place, a slice out of range, a rank larger
            than the matrix, a transform that can't stand where it does, and with `strict` an uneven match.
    """
    names, graph = list(model.aliases), model.graphs["eval"]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    new = {model.aliases[name] for name in new}
    found = _Found(model, graph, shapes, new, given or {})
    mistakes = []
    for r, rule in enumerate(rules):
        try:
            _add(found, r, rule, strict)
        except SpecError as error:
            mistakes.append(error)
    raise_all(mistakes)
    sites = found.sites
    warnings = [*found.warnings, *_untuned(sites, new)]
    if strict and warnings:
        raise SpecError(warnings[0], ("rules",))
    order = {name: i for i, name in enumerate([*names, *found.modules])}
    total = sum(torch.Size(shapes[weight]).numel() for weight in dict.fromkeys(model.aliases.values()))
    sites.sort(key=lambda site: (site.layout is None, order[site.place], KINDS.index(site.kind), site.block or ()))
    notes = dict.fromkeys([*found.notes, *_unmerged(sites)])
    return Plan(tuple(sites), total, tuple(warnings), tuple(notes), tuple(rules), tuple(sorted(new)))


def _untuned(sites: list[Site], new: set[str]) -> list[str]:
    tuned = {site.place for site in sites if site.layout}
    return [f"{name} is newly made and no rule tunes it: it stays random" for name in sorted(new - tuned)]


def _unmerged(sites: list[Site]) -> list[str]:
    stay: dict[str, int] = {}
    for site in sites:
        if not site.merges:
            stay[site.transform] = stay.get(site.transform, 0) + 1
    return [
        f"{transform} can't merge into a plain weight ({count} sites): no merged checkpoint; it stays in the ONNX graph"
        for transform, count in stay.items()
    ]


@dataclass
class _Found:
    """The model that rules are resolved against, and what they came to so far."""

    model: TracedModel
    graph: fx.Graph
    shapes: dict[str, tuple[int, ...]]
    new: set[str]
    given: Given
    sites: list[Site] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    composed: dict[tuple, tuple] = field(default_factory=dict)  # what sites that are alike share

    def __post_init__(self):
        self.modules = modules(self.graph)
        self.crossing = {one.module for one in attentions(self.graph) if one.cross}
        self.used = {node.target for node in self.graph.find_nodes(op="get_attr")}


def _add(found: _Found, r: int, rule: Rule, strict: bool) -> None:
    """Resolve one rule."""
    kinds = set(KINDS).intersection(*(one.on for one, _ in rule.chain))
    if not kinds:
        chain = ", ".join(f"{one.name} ({', '.join(one.on)})" for one, _ in rule.chain)
        raise SpecError(f"these methods have no kind of place in common: {chain}", ("rules", r, "apply"))
    path, inside = ("rules", r, "target"), kinds - PARAMETERS
    names, where = list(found.model.aliases), "parameter"
    if inside and not (kinds & PARAMETERS and _hits(rule.targets, names)):
        names, where = found.modules, "module"
    if rule.slice and where == "module":
        raise SpecError("a slice is of a parameter, but this rule targets modules", ("rules", r, "slice"))
    hits = find(rule.targets, names, path, where)
    uneven_hits = [f"rules[{r}]: {sentence}" for sentence in uneven(rule.targets, hits, names)]
    if uneven_hits and strict:
        raise SpecError(f"uneven match: {uneven_hits[0].partition(': ')[2]}", path)
    found.warnings += uneven_hits if where == "parameter" else []
    before = len(found.sites)
    if where == "module":
        _add_modules(found, r, rule, hits, inside)
    else:
        for weight in dict.fromkeys(found.model.aliases[name] for name in hits):
            _add_parameter(found, r, rule, weight)
    if len(found.sites) == before and where == "module":
        wanted = " or ".join(sorted(inside))
        raise SpecError(f"no {wanted} in {', '.join(hits[:3])}; {_HINT.get(min(inside), '')}", path)


def _add_parameter(found: _Found, r: int, rule: Rule, weight: str) -> None:
    aliases = found.model.tied.get(weight, [weight])
    if not found.used.intersection(aliases):
        found.warnings.append(f"rules[{r}]: {weight} is not used by the model's forward; it is left out")
        return
    if len(aliases) > 1:
        found.notes.append(f"{' = '.join(aliases)} are tied: every use sees the transform and the merge keeps the tie")
    readers = uses(found.graph, aliases)
    layout = layout_of(found.shapes[weight], readers)
    crossing = any(weight.startswith(f"{module}.") for module in found.crossing)
    kind = "vector" if layout.vector else "matrix"
    for j, (one, _) in enumerate(rule.chain):
        _check_kind(weight, kind, crossing, one, ("rules", r, "apply", j, one.name))
    shape, block = layout.shape, None
    if rule.slice:
        block, shape = _cut(rule, r, weight, layout)
    formed = [user for node, user in readers if factored(user, node, layout) is None]
    site = _site(found, r, rule, kind, weight, shape, block, layout, kind == "matrix" and not formed)
    if not site.merges and (formed or block):
        what = "a slice" if block else str(formed[0].target)
        raise SpecError(
            f"{site.transform} has no matrix to form, but {weight} is read by {what}; it works on linear layers",
            ("rules", r, "target"),
        )
    _check_overlap(site, found.sites)
    found.sites.append(site)


def _add_modules(found: _Found, r: int, rule: Rule, hits: list[str], kinds: set[str]) -> None:
    hits = [hit for hit in hits if not any(hit.startswith(f"{other}.") for other in hits)]
    lacking: dict[str, list[str]] = {}
    for module in hits:
        there = list(places(found.graph, module, kinds))
        for kind in kinds:
            if not any(one == kind for one, _, _ in there):
                lacking.setdefault(kind, []).append(module)
        for kind, place, shape in there:
            site = _site(found, r, rule, kind, place, shape)
            if any((one.kind, one.place) == (kind, place) for one in found.sites):
                raise SpecError(
                    f"{site.label} is transformed twice; a chain in `apply` composes", ("rules", r, "target")
                )
            found.sites.append(site)
    names = ", ".join(one.name for one, _ in rule.chain)
    for kind, without in lacking.items():
        among = "as in others that match" if len(without) < len(hits) else f"so {names} stands on less than it can"
        found.warnings.append(f"rules[{r}]: no {kind} in {', '.join(without[:3])}, {among}")


def _site(
    found: _Found,
    r: int,
    rule: Rule,
    kind: str,
    place: str,
    shape: tuple[int, ...],
    block: Block | None = None,
    layout: Layout | None = None,
    linear: bool = False,
) -> Site:
    """A site, complete: its expression was composed on the meta device, once for sites that are alike."""
    name, label = name_of(kind, place, block), label_of(kind, place, block)
    for j, (one, options) in enumerate(rule.chain):
        _check_sizes(label, shape, one, options, ("rules", r, "apply", j, one.name))
    given = {step: sizes for step, sizes in found.given.items() if step.rpartition(".")[0] == name}
    key = r, kind, shape, tuple((step.rpartition(".")[2], *sizes.items()) for step, sizes in given.items())
    if key not in found.composed:
        found.composed[key] = name, _compose(r, rule, kind, label, shape, layout, name, given)
    first, (leaves, schedules, merges, rows) = found.composed[key]
    own = lambda text: name + text.removeprefix(first) if text.startswith(f"{first}.") else text  # noqa: E731
    return Site(
        kind, place, block, shape, layout, tuple(rule.chain),
        tuple(replace(leaf, name=own(leaf.name)) for leaf in leaves),
        tuple((own(step), schedule) for step, schedule in schedules),
        head=layout is not None and place in found.new, merges=merges, linear=linear, rows=rows, rule=r, given=given,
    )  # fmt: skip


def _compose(
    r: int,
    rule: Rule,
    kind: str,
    label: str,
    shape: tuple[int, ...],
    layout: Layout | None,
    name: str,
    given: Given,
) -> tuple[list[Leaf], list[tuple[str, Schedule]], bool, int]:
    """A chain on the meta device: its leaves, its schedules, whether it merges, and the rows it puts before others."""
    leaves: dict[str, Leaf] = {}
    schedules: list[tuple[str, Schedule]] = []

    def lookup(leaf: Leaf) -> Tensor:
        leaves[leaf.name] = replace(leaf, initial=0.0)
        return leaf.empty("meta")

    w = torch.empty(shape, device="meta")
    base = Dense(w) if layout else Computed(w)
    chain, apply = ", ".join(one.name for one, _ in rule.chain), ("rules", r, "apply")
    try:
        op = compose(rule.chain, base, shape, lookup, name, kind, given, schedules=schedules)
        rows = len(rows_of(op)) if kind in ("keys", "values", "embeddings") else 0
        merges = layout is not None and _forms(op, shape)
    except SpecError as error:
        raise SpecError(error.message, apply) from None
    except NotImplementedError:
        message = f"{chain}: a method needs a matrix, but the one before is none"
        if not layout:
            message = f"{chain}: these methods do not compose on {kind}"
        raise SpecError(message, apply) from None
    except Exception as error:
        raise SpecError(f"{chain}: the expression fails on {label}: {reason(error)}", apply) from error
    if w._version:
        raise SpecError(f"{chain}: the expression changes the frozen weight in place", apply)
    return list(leaves.values()), schedules, merges, rows


def _forms(op: Operator, shape: tuple[int, ...]) -> bool:
    """Whether an expression is a matrix of the shape."""
    try:
        return tuple(op.dense().shape) == tuple(shape)
    except NotImplementedError:
        return False


def _check_sizes(
    label: str, shape: tuple[int, ...], one: Transform, options: BaseModel, path: tuple[str | int, ...]
) -> None:
    """Refuse an option that is larger than what its type says the shape allows."""
    for option, field_ in type(options).model_fields.items():
        for mark in field_.metadata:
            value = getattr(options, option)
            if isinstance(mark, AtMost) and value is not None and value > mark.bound(*shape[-2:]):
                raise SpecError(
                    f"{option} {value} is larger than {label} allows: it is {shape[-2]} x {shape[-1]}", (*path, option)
                )


def _hits(patterns: list[str], names: list[str]) -> bool:
    try:
        return bool(match(patterns, names))
    except ValueError:
        return False


def places(graph: fx.Graph, module: str, kinds: Collection[str]) -> Iterator[tuple[str, str, tuple[int, int]]]:
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


def _cut(rule: Rule, r: int, weight: str, layout: Layout) -> tuple[Block, tuple[int, ...]]:
    """The block and the shape of a slice."""
    axis, (start, stop) = rule.slice.axis, rule.slice.bounds
    shape = layout.shape
    size = shape[-1] if axis == "out" else shape[-2]
    if stop > size:
        raise SpecError(f"{weight} has {size} {axis}puts, so [{start}, {stop}] is out of range", ("rules", r, "slice"))
    shape = (*shape[:-1], stop - start) if axis == "out" else (*shape[:-2], stop - start, shape[-1])
    return (axis, start, stop), shape


def _check_kind(weight: str, kind: str, crossing: bool, one: Transform, path: tuple[str | int, ...]) -> None:
    if kind in one.on or (crossing and kind == "matrix" and "cross_attention" in one.on):
        return
    if "cross_attention" in one.on and kind == "matrix":
        message = f"{one.name} is for weights of cross-attention, but the target matches {weight}"
    elif kind == "vector":
        plain = [other for other in TRANSFORMS.values() if kind in other.on and not other.options.model_fields]
        names = " or ".join(other.name for other in sorted(plain, key=lambda other: -len(other.on)))
        message = f"{one.name} needs a matrix, but the target matches the vector {weight}; use {names}"
    else:
        message = f"{one.name} tunes vectors (biases), but the target matches the matrix {weight}"
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
