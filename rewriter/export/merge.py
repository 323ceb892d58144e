"""Merge: every tuned subspace becomes a plain weight under the weight's own name."""

import itertools
from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..algebra import as_dense
from ..errors import SubspanError
from ..graph.traced import TracedModel, assign, released
from ..plan import Site, transformed
from ..rewrite import rewrite
from ..transforms import Leaf
from ..tuned import TunedModel, adapter_tensors


def merged_weights(model: TunedModel, partly: bool = False, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """phi(W) of every transformed weight, in the weight's own shape, computed in float32 or wider.

    Args:
        model: from `rewrite` or `load_adapter`.
        partly: leave out weights that can't merge.
        names: of the weights that are wanted; default: all.

    Raises:
        SubspanError: a transform can't merge, or a merged weight is not finite.
    """
    return dict(_merged(model, partly, names))


def _merging(model: TunedModel, partly: bool, so: str) -> Iterator[tuple[str, list[Site]]]:
    """Weights that merge, with their sites.

    Args:
        so: what is said of a site that can't, after that.

    Raises:
        SubspanError: one can't, and `partly` does not leave it out.
    """
    stay = [site for site in model.plan.sites if not site.merges]
    for site in stay:
        if not partly:
            raise SubspanError(f"{site.label}: {site.transform} can't merge{so}")
    for weight, sites in model.plan.by_weight().items():
        if not any(site.place == weight for site in stay):
            yield weight, sites


@torch.no_grad()
def _merged(model: TunedModel, partly: bool, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """`merged_weights`, one at a time; when the next one is asked for the base of the last is read no more."""
    leaves = adapter_tensors(model)

    def lookup(site: Site, leaf: Leaf) -> Tensor:
        return leaves[leaf.name].detach()

    for weight, sites in _merging(model, partly, " into a plain weight"):
        if names is not None and weight not in names:
            continue
        stored = as_dense(model.get_parameter(weight).detach())
        wide = stored.to(torch.promote_types(stored.dtype, torch.float32))
        value = sites[0].layout.restore(transformed(sites, wide, lookup).dense())
        if not torch.isfinite(value.to(stored.dtype)).all():
            raise SubspanError(f"{weight}: the merged weight is not finite in {stored.dtype}")
        yield weight, value


def merge(model: TunedModel, *into: nn.Module, partly: bool = False) -> float:
    """Write the merged weights of a tuned model into plain modules that have the same parameter names.

    Tied weights stay tied, and the modules share what is new. The tensors that they shared with other modules are left
    as they were.

    Args:
        model: from `rewrite` or `load_adapter`.
        into: the traced model, or the module it was traced from. If the tuned model is among them, it is one no longer,
            and there is never more than one whole set of weights.
        partly: leave the weights that can't merge as they were; `rest` puts what is missing on top.

    Returns:
        Largest absolute difference that storing in the module's own type made.

    Raises:
        SubspanError: as `merged_weights`, or a module lacks a weight, or there is none.
    """
    if not into:
        raise SubspanError("give merge the module, or modules, that the weights are to be written into")
    for module in into:
        there = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        if missing := sorted({*model.plan.new, *model.plan.by_weight()} - there):
            raise SubspanError(f"the module has no parameter {missing[0]}")
    stored = 0.0
    for name, value in itertools.chain(
        ((name, model.get_parameter(name).detach()) for name in model.plan.new), _merged(model, partly)
    ):
        old = [module.get_parameter(name) for module in into]
        new = nn.Parameter(
            value.to(old[0].device, old[0].dtype).clone(memory_format=torch.contiguous_format), old[0].requires_grad
        )
        for module in into:
            assign(module, {name: new})
        stored = max(stored, float((new.detach().to(value) - value).abs().max()) if value.numel() else 0.0)
        if model in into:
            for one in old:
                released(one)
    return stored


@torch.no_grad()
def changes(model: TunedModel, partly: bool = False) -> Iterator[tuple[str, list[Site], Tensor, Tensor]]:
    """Weight, its sites, W and phi(W) - W as sites see them, in float64, of all that are no newly made parameters.

    Args:
        partly: leave out weights that can't merge.

    Raises:
        SubspanError: something can't merge.
    """
    leaves = adapter_tensors(model)
    for weight, sites in _merging(model, partly, ", so it is no change of a weight"):
        if weight in model.plan.new:
            continue
        stored = as_dense(model.get_parameter(weight).detach()).double()
        w = sites[0].layout.present(stored).dense()
        made = transformed(sites, stored, lambda _, leaf: _wide(leaves[leaf.name].detach())).dense()
        yield weight, sites, w, made - w


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def staying(model: TunedModel, without: Collection[str] = (), merged: bool = True) -> tuple[Site, ...]:
    """The sites of a tuned model that stay in a graph; arguments as of `rest`."""
    return tuple(site for site in model.plan.sites if not (merged and site.merges) and site.kind not in without)


def rest(model: TunedModel, onto: TracedModel, without: Collection[str] = (), merged: bool = True) -> TunedModel:
    """What merges no further: `onto` with the sites of a tuned model that can't merge.

    Args:
        model: from `rewrite` or `load_adapter`.
        onto: traced, with everything merged into it that can be.
        without: kinds of sites to leave out.
        merged: if not, nothing is merged into `onto`, and it gets all sites.
    """
    plan = replace(model.plan, sites=staying(model, without, merged))
    values = {name: value.detach() for name, value in adapter_tensors(model).items()}
    return rewrite(onto, plan, values=values, without=model.without, also=model.also)
