"""Resolve: the rules of a spec against a traced model, to a plan of complete sites. Shapes alone are read."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from pydantic import BaseModel
from torch import Tensor, fx

from ..algebra import Computed, Dense, Operator, held_bytes, moved_by, rows_of
from ..errors import SpecError, raise_all, reason
from ..graph.globs import find, match, uneven
from ..graph.ops import SOFTMAX, aten
from ..graph.positions import tables
from ..graph.sublayers import (
    KNOWN,
    Attention,
    Sublayer,
    attentions,
    call_of,
    channels_first,
    embeddings,
    modules,
    paths,
    shape_of,
    sublayers,
    unknown_inputs,
)
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
    _check_varies(model, sites)
    _check_moves(graph, sites)
    notes = dict.fromkeys([*found.notes, *_unmerged(sites)])
    held = sum(held_bytes(one) for one in model.parameters())
    return Plan(tuple(sites), total, held, tuple(warnings), tuple(notes), tuple(rules), tuple(sorted(new)))


def _check_moves(graph: fx.Graph, sites: list[Site]) -> None:
    """Rows that take positions take as many in every layer, of tables of positions.

    Raises:
        SpecError: at the rule.
    """
    moving = [site for site in sites if site.moves]
    layers = [site for site in sites if site.kind in ("keys", "values")]
    if moving and not tables(graph):
        said = "its rows are to take positions, and the model has no table of positions that it counts itself"
        raise SpecError(f"{moving[0].transform}: {said}", ("rules", moving[0].rule, "apply"))
    if moving and (other := next((site for site in layers if site.moves != moving[0].moves), None)):
        said = f"take {moving[0].moves} positions at {moving[0].label} and {other.moves} here: a token has one position"
        raise SpecError(f"{other.label}: rows {said}", ("rules", other.rule, "apply"))


def _check_varies(model: TracedModel, sites: list[Site]) -> None:
    """Rows before the tokens make sequences longer: the trace has to allow for that, and say what inputs mean.

    Raises:
        SpecError: at the rule.
    """
    for site in sites:
        if site.kind != "embeddings":
            continue
        path = ("rules", site.rule, "target")
        if not model.varies:
            said = f"{site.transform} puts rows before the tokens, but the model was traced for sequences of one length"
            raise SpecError(f"{said}: make dimension 1 of its inputs dynamic", path)
        for node in embeddings(model.graphs["eval"], site.place):
            if unknown := unknown_inputs(model.graphs["eval"], node):
                said = f"{site.transform} puts rows before the tokens; what the input {unknown[0]!r} is for them"
                raise SpecError(f"{said} is not known: inputs along the tokens are {KNOWN}", path)


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
        self.modules, self.tied = modules(self.graph), self.model.tied
        self.crossing = {one.module for one in attentions(self.graph) if one.cross}
        self.dtypes = {name: p.dtype for name, p in self.model.named_parameters(remove_duplicate=False)}
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
            own = [hit for hit in hits if found.model.aliases[hit] == weight]
            _add_parameter(found, r, rule, weight, own)
    if len(found.sites) == before and where == "module":
        wanted = " or ".join(sorted(inside))
        raise SpecError(f"no {wanted} in {', '.join(hits[:3])}; {_why_none(found.graph, hits, inside)}", path)


def _why_none(graph: fx.Graph, hits: list[str], kinds: set[str]) -> str:
    """Why nothing of these kinds is in modules, or where to look."""
    if kinds & {"keys", "values", "attention"}:
        for node in graph.nodes:
            if node.target in SOFTMAX and set(hits) & set(paths(node)) and len(shape_of(node)) == 4:
                source = next((one for one in node.all_input_nodes), node)
                op = getattr(source.target, "__name__", str(source.target)).split(".")[0]
                return f"the softmax in {paths(node)[-1]} is none of queries times keys alone (it reads {op})"
    return _HINT.get(min(kinds), "")


def _add_parameter(found: _Found, r: int, rule: Rule, weight: str, named: list[str]) -> None:
    aliases = found.tied.get(weight, [weight])
    if not found.dtypes[weight].is_floating_point:
        said = f"{weight} is stored in {str(found.dtypes[weight]).removeprefix('torch.')}; floating weights are tuned"
        raise SpecError(said, ("rules", r, "target"))
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
        if layout.odd and "vector" not in one.on:
            said = f"how {weight} is read is not understood ({layout.odd}), so neither what are its inputs and outputs"
            raise SpecError(f"{said}; use {_plain()}", ("rules", r, "apply", j, one.name))
        _check_kind(weight, kind, crossing, one, ("rules", r, "apply", j, one.name))
    shape, block = layout.shape, None
    if rule.slice:
        flipped = len(aliases) > 1 and _as_table(readers, named, ("rules", r, "slice")) and layout.transposed
        block, shape = _cut(rule, r, weight, layout, flipped)
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
        try:
            there = list(places(found.graph, module, kinds))
        except SpecError as error:
            raise SpecError(error.message, ("rules", r, "target")) from None
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
    first, (leaves, schedules, merges, rows, moves) = found.composed[key]
    own = lambda text: name + text.removeprefix(first) if text.startswith(f"{first}.") else text  # noqa: E731
    return Site(
        kind, place, block, shape, layout, tuple(rule.chain),
        tuple(replace(leaf, name=own(leaf.name)) for leaf in leaves),
        tuple((own(step), schedule) for step, schedule in schedules),
        head=layout is not None and place in found.new, merges=merges, linear=linear, rows=rows, moves=moves, rule=r,
        given=given,
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
) -> tuple[list[Leaf], list[tuple[str, Schedule]], bool, int, int]:
    """A chain on the meta device: its leaves, its schedules, whether it merges, the rows it puts before others, and the
    positions that these take."""
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
    return list(leaves.values()), schedules, merges, rows, moved_by(op)


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
        _check_one_layer(graph, module, calls)
        first = {one.kind: one for call in calls for one in reversed(call)}
        for kind in sorted(wanted & first.keys()):
            yield kind, module, (shape_of(first[kind].input)[-1], shape_of(first[kind].output)[-1])
    if wanted & {"keys", "values"}:
        once: dict[str, Attention] = {}
        for one in attentions(graph, module):
            before = once.setdefault(one.module, one)
            if before is not one:
                if call_of(before.node) == call_of(one.node):
                    raise SpecError(f"{one.module} has several softmaxes; which of them attends is not known")
                continue
            for kind in ("keys", "values"):
                if kind in wanted:
                    yield kind, one.module, (one.width(kind), one.width(kind))
    if "embeddings" in wanted:
        for node in embeddings(graph, module):
            yield "embeddings", paths(node)[-1], tuple(map(int, shape_of(node.args[0])))


def _check_one_layer(graph: fx.Graph, module: str, calls: list[list[Sublayer]]) -> None:
    """A module is one layer: one feed-forward at most, with channels in its last dimension.

    Raises:
        SpecError: with what it is instead.
    """
    for call in calls:
        forward = [one for one in call if one.kind == "feed_forward"]
        if len({one.skip for one in forward}) > 1:
            layers = [name for name in modules(graph) if name.startswith(f"{module}.") and name[-1].isdigit()]
            example = f", e.g. {layers[0].rpartition('.')[0]}.*" if layers else ""
            raise SpecError(f"{module} holds several layers; target each of them{example}")
        if len(forward) > 1:
            said = f"{module} adds {len(forward)} parallel feed-forwards (experts that are shared, for example)"
            raise SpecError(f"{said}; which of them is meant is not known: target weights in them instead")
        for one in call:
            if op := channels_first(one.output):
                said = f"{module} has its channels before other dimensions ({op})"
                raise SpecError(f"{said}; what stands inside a residual works on the last one: target weights instead")


def _as_table(readers: list[tuple[fx.Node, fx.Node]], named: list[str], path: tuple[str | int, ...]) -> bool:
    """Whether a rule names a tied weight as the table that it is of ids, and not as the linear layer that it is too.

    Raises:
        SpecError: it names both, so that a slice has two meanings.
    """
    tables = [user for _, user in readers if user.target is aten.embedding.default]
    others = [user for _, user in readers if user.target is not aten.embedding.default]
    if not tables or not others:
        return bool(tables)
    owners = {name.rpartition(".")[0] for name in named}
    table, other = (any(owner in paths(user) for user in some for owner in owners) for some in (tables, others))
    if table and other:
        said = f"{' = '.join(named)} is a table of ids and a linear layer, whose inputs are the other's outputs"
        raise SpecError(f"{said}: target one of its names to say which is sliced", path)
    return not other


def _cut(rule: Rule, r: int, weight: str, layout: Layout, flipped: bool) -> tuple[Block, tuple[int, ...]]:
    """The block and the shape of a slice; `flipped`: the rule means the other orientation than the layout's."""
    axis, (start, stop) = rule.slice.axis, rule.slice.bounds
    axis = {"in": "out", "out": "in"}[axis] if flipped else axis
    shape = layout.shape
    size = shape[-1] if axis == "out" else shape[-2]
    if stop > size:
        raise SpecError(
            f"{weight} has {size} {rule.slice.axis}puts, so [{start}, {stop}] is out of range", ("rules", r, "slice")
        )
    shape = (*shape[:-1], stop - start) if axis == "out" else (*shape[:-2], stop - start, shape[-1])
    return (axis, start, stop), shape


def _plain() -> str:
    """The methods without options that work on any vector."""
    plain = [other for other in TRANSFORMS.values() if "vector" in other.on and not other.options.model_fields]
    return " or ".join(other.name for other in sorted(plain, key=lambda other: -len(other.on)))


def _check_kind(weight: str, kind: str, crossing: bool, one: Transform, path: tuple[str | int, ...]) -> None:
    if kind in one.on or (crossing and kind == "matrix" and "cross_attention" in one.on):
        return
    if "cross_attention" in one.on and kind == "matrix":
        message = f"{one.name} is for weights of cross-attention, but the target matches {weight}"
    elif kind == "vector":
        message = f"{one.name} needs a matrix, but the target matches the vector {weight}; use {_plain()}"
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
