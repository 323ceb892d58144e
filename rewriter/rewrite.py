"""The rewrite: a traced model and a plan become a model that holds the tuned tensors beside the frozen weights."""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from .algebra import Computed, Dense, Operator, as_dense
from .graph.sublayers import embeddings
from .graph.traced import TracedModel, copy_graph
from .passes.base import PREFIX, Context
from .passes.manager import run
from .plan import Plan, Site, transformed
from .svd import cached_svd
from .transforms import Leaf, initial_value
from .tuned import TunedModel


def rewrite(
    model: TracedModel,
    plan: Plan,
    seed: int = 0,
    values: Mapping[str, Tensor] | None = None,
    without: Collection[str] = (),
    also: Collection[str] = (),
    changed: dict[str, int] | None = None,
    given: frozenset[str] | None = None,
) -> TunedModel:
    """A new module with every site transformed; the frozen weights are shared with `model`, not copied.

    Parameters named `subspan.*` are tuned (float32 or wider), all others are frozen.

    Args:
        model: a traced model; without weights (on the meta device) the result has shapes alone.
        plan: made from the same model, or from the same model on the meta device.
        seed: seed of the start values.
        values: leaf name -> value, instead of the start value; what `allocate` chose, for example.
        without, also, changed: passes to leave out, passes that change numerics to run all the same, and how many nodes
            each pass changed, counted up; see `passes.manager.run`.
        given: names of constants in `values` that can't be computed again; default: all of them.

    Raises:
        SpecError: a transform needs a choice that `values` lacks, or a name is no pass.
    """
    graphs = {mode: copy_graph(graph) for mode, graph in model.graphs.items()}
    constants = {leaf.name for site in plan.sites for leaf in site.leaves if leaf.role == "constant"}
    given = frozenset(constants & (values or {}).keys()) if given is None else given
    out = TunedModel(model, plan, graphs, dict(model.signatures), dict(model.aliases), given)
    out.share(model)
    out.requires_grad_(False)
    out.train(model.training)
    out.without, out.also = tuple(without), tuple(also)
    _add_leaves(out, model, plan, seed, values or {})
    dtypes = {name: p.dtype for name, p in model.named_parameters(remove_duplicate=False)}
    for mode, graph in graphs.items():
        context = Context(mode, plan, model.tied, dtypes, lowered=model.lowered.setdefault(mode, {}))
        graphs[mode] = run(graph, "rewrite", context, without, also, changed)
    out.recompile()
    return out


def _add_leaves(out: TunedModel, model: TracedModel, plan: Plan, seed: int, values: Mapping[str, Tensor]) -> None:
    """Register every leaf of a plan with its value, or its start value, which the expressions themselves give."""
    weights = dict(out.named_parameters(remove_duplicate=False))
    made: dict[str, Tensor] = {}
    for weight, sites in plan.by_weight().items():
        stored = as_dense(weights[weight].detach())
        wide = stored.to(torch.promote_types(stored.dtype, torch.float32))
        transformed(sites, wide, _initialiser(out, wide, seed, values, made))
    for site in plan.sites:
        if site.layout is None:
            w, start = _base(model, site)
            lookup = _initialiser(out, start, seed, values, made)
            site.compose(w, lambda leaf, site=site, lookup=lookup: lookup(site, leaf))


def _base(model: TracedModel, site: Site) -> tuple[Operator, Tensor]:
    """What the start values of a site inside a module are taken from, and an example of their type and device.

    For embeddings the vocabulary, for others nothing.
    """
    example = next(model.parameters()).detach()
    example = example.to(torch.promote_types(example.dtype, torch.float32))
    if site.kind != "embeddings":
        return Computed(example), example
    node = embeddings(model.graphs["eval"], site.place)[0]
    table = as_dense(dict(model.named_parameters(remove_duplicate=False))[node.args[0].target].detach())
    return Dense(table.to(example.dtype)), example


def _initialiser(
    out: TunedModel, stored: Tensor, seed: int, values: Mapping[str, Tensor], made: dict[str, Tensor]
) -> Callable[[Site, Leaf], Tensor]:
    def lookup(site: Site, leaf: Leaf) -> Tensor:
        if leaf.name in made:
            return made[leaf.name]
        value = values.get(leaf.name)
        if stored.is_meta:
            value = leaf.empty("meta")
        elif value is None:
            value = initial_value(leaf, seed, lambda: cached_svd(site.part(stored)))
        value = value.to(stored.device, leaf.dtype or stored.dtype).reshape(leaf.shape).contiguous()
        made[leaf.name] = value
        out.add(PREFIX + leaf.name, nn.Parameter(value) if leaf.role == "tuned" else value, persistent=False)
        return value

    return lookup
