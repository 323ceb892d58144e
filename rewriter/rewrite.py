"""The rewrite: a traced model and a plan become a module that holds the tuned tensors beside the frozen weights."""

import contextlib
import hashlib
import os
from pathlib import Path

import torch
from torch import nn

from .errors import SubspanError
from .files import aside, load_tensors, save_tensors
from .passes import remove_dead
from .passes.insert_transforms import PREFIX, insert_transforms
from .plan import Plan, Site, transformed
from .trace import GraphModel
from .transforms import Leaf, decompose, initial_value


def rewrite(model: GraphModel, plan: Plan, seed: int = 0) -> GraphModel:
    """A new module with every site transformed; the frozen weights are shared with `model`, not copied.

    Parameters named `subspan.*` are tuned (float32 or wider), all others are frozen.

    Args:
        model: a traced model with weights.
        plan: made from the same model, or from the same model on the meta device.
        seed: seed of the start values.

    Raises:
        SubspanError: the model is on the meta device.
    """
    out = model.clone()
    weights = dict(out.named_parameters(remove_duplicate=False))
    if any(p.is_meta for p in weights.values()):
        raise SubspanError("rewrite needs weights; the model is on the meta device")
    out.requires_grad_(False)
    for weight, sites in plan.by_weight().items():
        stored = weights[weight].detach()
        wide = stored.to(torch.promote_types(stored.dtype, torch.float32))
        transformed(sites, wide, _initialiser(out, wide, seed))
    dtypes = {name: p.dtype for name, p in weights.items()}
    for graph in out.graphs.values():
        remove_dead(insert_transforms(graph, plan, model.tied, dtypes))
    drop_dropout(out.graphs["eval"])
    out.plan = plan
    out.recompile()
    return out


def drop_dropout(graph: torch.fx.Graph) -> torch.fx.Graph:
    """The eval graph without the dropout that transforms inserted."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default):
        if "subspan" in node.meta:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph


def _initialiser(out: GraphModel, stored: torch.Tensor, seed: int):
    def lookup(site: Site, leaf: Leaf) -> torch.Tensor:
        value = initial_value(leaf, seed, lambda: cached_svd(_block(site, stored)))
        value = value.to(stored.device, stored.dtype).reshape(leaf.shape).contiguous()
        out.add(PREFIX + leaf.name, nn.Parameter(value) if leaf.tuned else value, persistent=False)
        return value

    return lookup


def _block(site: Site, stored: torch.Tensor) -> torch.Tensor:
    w = site.layout.present(stored).dense()
    if site.block:
        axis, start, stop = site.block
        w = w.narrow(-1 if axis == "out" else -2, start, stop - start)
    return w


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
    tuned = {name for site in model.plan.sites for name, _, is_tuned in site.leaves if is_tuned}
    named = ((name.removeprefix(PREFIX), p) for name, p in model.named_parameters() if name.startswith(PREFIX))
    return {name: p for name, p in named if name in tuned}
