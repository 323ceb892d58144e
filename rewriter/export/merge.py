"""Merge: every tuned subspace becomes a plain weight under the weight's own name."""

from dataclasses import replace

import torch
from torch import nn

from ..errors import SubspanError
from ..graph.traced import TracedModel, assign
from ..plan import Site, transformed
from ..rewrite import rewrite
from ..transforms import Leaf
from ..tuned import TunedModel, adapter_tensors


@torch.no_grad()
def merged_weights(model: TunedModel, partly: bool = False) -> dict[str, torch.Tensor]:
    """phi(W) of every transformed weight, in the weight's own shape, computed in float32 or wider.

    Args:
        model: from `rewrite` or `load_adapter`.
        partly: leave out weights that can't merge.

    Raises:
        SubspanError: a transform can't merge, or a merged weight is not finite.
    """
    named, leaves = dict(model.named_parameters(remove_duplicate=False)), adapter_tensors(model)

    def lookup(site: Site, leaf: Leaf) -> torch.Tensor:
        return leaves[leaf.name].detach()

    merged = {}
    stay = [site for site in model.plan.sites if not site.merges]
    for site in stay:
        if not partly:
            raise SubspanError(f"{site.label}: {site.transform} can't merge into a plain weight")
    for weight, sites in model.plan.by_weight().items():
        if any(site.place == weight for site in stay):
            continue
        stored = named[weight].detach()
        wide = stored.to(torch.promote_types(stored.dtype, torch.float32))
        value = sites[0].layout.restore(transformed(sites, wide, lookup).dense())
        if not torch.isfinite(value.to(stored.dtype)).all():
            raise SubspanError(f"{weight}: the merged weight is not finite in {stored.dtype}")
        merged[weight] = value
    return merged


def merge(model: TunedModel, into: nn.Module, partly: bool = False) -> float:
    """Write the merged weights of a tuned model into a plain module that has the same parameter names.

    Tied weights stay tied. The tensors that `into` shared with other modules are left as they were.

    Args:
        model: from `rewrite` or `load_adapter`.
        into: the traced model, or the module it was traced from.
        partly: leave the weights that can't merge as they were; `rest` puts what is missing on top.

    Returns:
        Largest absolute difference that storing in the module's own type made.

    Raises:
        SubspanError: as `merged_weights`, or `into` lacks a weight.
    """
    weights = merged_weights(model, partly)
    named = dict(into.named_parameters(remove_duplicate=False))
    if missing := sorted(weights.keys() - named.keys()):
        raise SubspanError(f"the module has no parameter {missing[0]}")
    own = dict(model.named_parameters(remove_duplicate=False))
    assign(into, {name: own[name] for name in model.plan.new} | weights)
    named = dict(into.named_parameters(remove_duplicate=False))
    return max(
        (float((named[name].detach().to(w) - w).abs().max()) for name, w in weights.items() if w.numel()), default=0.0
    )


def rest(model: TunedModel, onto: TracedModel) -> TunedModel:
    """What merges no further: `onto` with the sites of a tuned model that can't merge.

    Args:
        model: from `rewrite` or `load_adapter`.
        onto: traced, with everything merged into it that can be.
    """
    plan = replace(model.plan, sites=tuple(site for site in model.plan.sites if not site.merges))
    values = {name: value.detach() for name, value in adapter_tensors(model).items()}
    return rewrite(onto, plan, values=values, without=model.without, also=model.also)
