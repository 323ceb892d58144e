"""What an adapter is tied to: base weights, the files beside them, and constants that are computed from weights."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..algebra import parts_of
from ..graph.traced import TracedModel
from ..passes.base import PREFIX
from ..tuned import TunedModel, adapter_tensors

_SKETCHES = 4
# Factors of one weight differ by 1e-5 or so between libraries of linear algebra; a column that is turned, by 1.
_NEAR = 1e-3


def fingerprint(model: TracedModel, new: tuple[str, ...] = ()) -> str:
    """SHA-256 over names, types, shapes and bytes of the frozen parameters, newly made ones apart, tied ones once, and
    of the statistics that are kept with them."""
    digest = hashlib.sha256()
    kept = model.state_dict()
    roots = tuple(one.root for one in model.adapters.values()) if isinstance(model, TunedModel) else (PREFIX,)
    others = {name for name in kept.keys() - model.aliases.keys() if not name.startswith(roots)}
    statistics = {name for name in others if kept[name].is_floating_point()}
    for name in sorted(set(model.aliases.values()) - set(new) | statistics):
        for part in parts_of(kept[name].detach()):
            tensor = part.cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def sketches(model: TunedModel) -> dict[str, list[float]]:
    """Leaf name of a constant -> 4 random bilinear forms of it, g F h with unit normal g and h, and its norm.

    A constant is no part of an adapter's file, since it follows from the frozen weight; these few numbers tell whether
    it still does.
    """
    constant = {leaf.name for site in model.plan.sites for leaf in site.leaves if leaf.role == "constant"}
    return {name: _sketch(value) for name, value in adapter_tensors(model).items() if name in constant}


def _sketch(value: Tensor) -> list[float]:
    wide = value.detach().double().cpu()
    wide = wide.reshape(1, -1) if wide.ndim < 2 else wide.flatten(0, -2)
    made = []
    for seed in range(_SKETCHES):
        generator = torch.Generator().manual_seed(seed)
        g = torch.randn(wide.shape[0], generator=generator, dtype=torch.float64)
        h = torch.randn(wide.shape[1], generator=generator, dtype=torch.float64)
        made.append(float(g @ wide @ h))
    return [*made, float(wide.norm())]


def other_constant(model: TunedModel, written: Mapping[str, Any]) -> str | None:
    """The first constant that is another one than it was when `written` was made by `sketches`."""
    now = sketches(model)
    for name, then in written.items():
        if name not in now or not isinstance(then, list) or len(then) != _SKETCHES + 1:
            return name
        near = _NEAR * max(now[name][-1], 1e-30)
        if any(not abs(a - b) <= near for a, b in zip(now[name], then, strict=True)):
            return name
    return None
