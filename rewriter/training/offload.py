"""Frozen weights that stay in the CPU's memory: an op that reads one copies it to its device for the time it takes."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..algebra import Elsewhere, held_bytes, maker_of, parts_of
from ..errors import SpecError
from ..graph.traced import assign
from .recompute import layer_of

PATH = ("limits", "weight_memory")


class Offloaded(Elsewhere):
    """A frozen weight of a model on some device, held in the CPU's memory; page-locked for a CUDA device."""

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """A weight on the CPU."""
        return cls(parts_of(weight.detach()), maker_of(weight), weight, weight.device)

    def brought(self) -> list[Tensor]:
        return [one.to(self.device, non_blocking=True) for one in self.held]

    def alike(self, held: tuple[Tensor, ...], like: Tensor, flipped: bool) -> "Offloaded":
        return Offloaded(held, self.made, like, self.device, flipped)

    def at(self, device: torch.device) -> "Offloaded":
        """The same weight of a model on another device."""
        held = tuple(one.pin_memory() if device.type == "cuda" else one for one in self.held)
        return Offloaded(held, self.made, self, device, self.flipped)

    def __repr__(self) -> str:
        return f"Offloaded({tuple(self.shape)}, device={self.device})"


def _moved(weight: Offloaded, *, dtype: Any = None, device: Any = None, **_: Any) -> Offloaded | None:
    return weight.at(torch.device(device or weight.device)) if dtype in (None, weight.dtype) else None


Offloaded.kept = {**Elsewhere.kept, torch.ops.aten._to_copy.default: _moved}


def layers_to_offload(model: nn.Module, most: float | None, without: Collection[str]) -> dict[str, list[str]]:
    """Layer -> names of its frozen matrices, of the fewest layers, from the first on, that leave a device with at
    most `most` bytes of weights, the largest of the others too, which has to be there while an op reads it.

    Args:
        model: on any device.
        most: None: any number.
        without: names of parameters that are no weights of the base.

    Raises:
        SpecError: what is no layer's matrix is more already.
    """
    if most is None:
        return {}
    named = {name: one for name, one in model.named_parameters() if name not in without}
    layers: dict[str, list[str]] = {}
    for name, one in named.items():
        if one.ndim > 1 and (layer := layer_of(name)):  # A vector is not worth a transfer.
            layers.setdefault(layer, []).append(name)
    left, largest, found = sum(map(held_bytes, named.values())), 0, {}
    for layer, names in layers.items():
        if left + largest <= most:
            break
        found[layer] = names
        left -= sum(held_bytes(named[name]) for name in names)
        largest = max(largest, *(named[name].numel() * named[name].element_size() for name in names))
    if left + largest > most:
        said = f", and the largest of the layers' matrices has {largest:,}" if found else ""
        said = f"{left:,} bytes of weights are no matrices of layers{said}"
        raise SpecError(f"{said}: more than the limit of {most:,.0f} bytes", PATH)
    return found


def offload(model: nn.Module, layers: Mapping[str, Sequence[str]]) -> None:
    """Keep the named frozen parameters of each layer in the CPU's memory, where they are, wherever the model goes. In
    place."""
    for name in (name for names in layers.values() for name in names):
        assign(model, {name: nn.Parameter(Offloaded.of(model.get_parameter(name)), requires_grad=False)})
