"""The rewrite: a traced model and a plan become a module that holds the tuned tensors beside the frozen weights."""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from .algebra import Computed, Dense, Operator
from .errors import SubspanError
from .files import aside, load_tensors, save_tensors
from .passes import remove_dead
from .passes.add_penalties import add_penalties
from .passes.insert_adapters import insert_adapters
from .passes.insert_prefixes import insert_prefixes
from .passes.insert_prompts import insert_prompts
from .passes.insert_transforms import insert_transforms
from .passes.lowering import PREFIX, Lowering
from .plan import Plan, Site, transformed
from .sublayers import embeddings
from .trace import GraphModel
from .transforms import Leaf, decompose, initial_value


def rewrite(
    model: GraphModel, plan: Plan, seed: int = 0, values: Mapping[str, torch.Tensor] | None = None
) -> GraphModel:
    """A new module with every site transformed; the frozen weights are shared with `model`, not copied.

    Parameters named `subspan.*` are tuned (float32 or wider), all others are frozen.

    Args:
        model: a traced model; without weights (on the meta device) the result has shapes alone.
        plan: made from the same model, or from the same model on the meta device.
        seed: seed of the start values.
        values: leaf name -> value, instead of the start value; what `allocate` chose, for example.

    Raises:
        SpecError: a method needs a choice that `values` lacks.
    """
    out = model.clone()
    weights = dict(out.named_parameters(remove_duplicate=False))
    out.requires_grad_(False)
    made: dict[str, torch.Tensor] = {}
    for weight, sites in plan.by_weight().items():
        stored = weights[weight].detach()
        wide = stored.to(torch.promote_types(stored.dtype, torch.float32))
        transformed(sites, wide, _initialiser(out, wide, seed, values or {}, made))
    dtypes = {name: p.dtype for name, p in weights.items()}
    common = next(iter(dtypes.values()))
    for site in plan.sites:
        if site.layout is None:
            w, start = _base(model, site, common)
            site.compose(w, lambda leaf, s=site, at=start: _initialiser(out, at, seed, values or {}, made)(s, leaf))
    for mode, graph in out.graphs.items():
        lowering = Lowering(graph, mode == "train")
        insert_adapters(lowering, plan, common)
        insert_prefixes(lowering, plan, common)
        insert_prompts(lowering, plan, common)
        insert_transforms(lowering, plan, model.tied, dtypes)
        if mode == "train":
            add_penalties(lowering)
        remove_dead(graph)
    drop_dropout(out.graphs["eval"])
    out.plan, out.base = plan, model
    out.recompile()
    return out


def drop_dropout(graph: torch.fx.Graph) -> torch.fx.Graph:
    """The eval graph without the dropout that transforms inserted."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default):
        if "subspan" in node.meta:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph


def _base(model: GraphModel, site: Site, dtype: torch.dtype) -> tuple[Operator, torch.Tensor]:
    """What the start values of a site inside a module are taken from, and an example of their type and device.

    For embeddings the vocabulary, for others nothing.
    """
    example = next(model.parameters()).detach()
    example = example.to(torch.promote_types(dtype, torch.float32))
    if site.kind != "embeddings":
        return Computed(example), example
    node = embeddings(model.graphs["eval"], site.place)[0]
    table = dict(model.named_parameters(remove_duplicate=False))[node.args[0].target].detach()
    return Dense(table.to(example.dtype)), example


def _initialiser(
    out: GraphModel,
    stored: torch.Tensor,
    seed: int,
    values: Mapping[str, torch.Tensor],
    made: dict[str, torch.Tensor],
):
    def lookup(site: Site, leaf: Leaf) -> torch.Tensor:
        if leaf.name in made:
            return made[leaf.name]
        value = values.get(leaf.name)
        if stored.is_meta:
            value = torch.empty(leaf.shape, device="meta")
        elif value is None:
            value = initial_value(leaf, seed, lambda: cached_svd(site.part(stored)))
        dtype = torch.int64 if leaf.role == "chosen" else stored.dtype
        value = value.to(stored.device, dtype).reshape(leaf.shape).contiguous()
        made[leaf.name] = value
        out.add(PREFIX + leaf.name, nn.Parameter(value) if leaf.role == "tuned" else value, persistent=False)
        return value

    return lookup


def cached_svd(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """`decompose`, once per weight: the factors are kept in `$SUBSPAN_CACHE`, by default `~/.cache/subspan`.

    A cache that can't be read or written is passed over.
    """
    data = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype}{tuple(data.shape)}".encode())
    digest.update(data.view(torch.uint8).numpy())
    root = Path(os.environ.get("SUBSPAN_CACHE") or Path.home() / ".cache" / "subspan")
    file = root / "svd" / f"{digest.hexdigest()}.safetensors"
    try:
        return {name: factor.to(weight.device) for name, factor in load_tensors(file).items()}
    except (OSError, SubspanError):
        factors = decompose(weight)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with aside(file) as (place,):
            save_tensors(factors, place)
    return factors


def tuned_parameters(model: GraphModel) -> dict[str, nn.Parameter]:
    """Leaf name -> tuned parameter, without the `subspan.` prefix."""
    tuned = {name for site in model.plan.sites for name in site.tuned}
    named = ((name.removeprefix(PREFIX), p) for name, p in model.named_parameters() if name.startswith(PREFIX))
    return {name: p for name, p in named if name in tuned}


def chosen_indices(model: GraphModel) -> dict[str, torch.Tensor]:
    """Leaf name -> indices (int64) of the entries that are tuned, without the `subspan.` prefix."""
    chosen = {leaf.name for site in model.plan.sites for leaf in site.leaves if leaf.role == "chosen"}
    named = ((name.removeprefix(PREFIX), b) for name, b in model.named_buffers() if name.startswith(PREFIX))
    return {name: b for name, b in named if name in chosen}
