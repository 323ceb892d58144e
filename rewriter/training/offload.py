"""Frozen weights that stay in the CPU's memory: an op that reads one copies it to its device for the time it takes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from operator import itemgetter
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..algebra import Stored, held_bytes, parts_of
from ..errors import SpecError
from ..graph.traced import assign
from .recompute import layer_of

PATH = ("limits", "weight_memory")


class Offloaded(Stored):
    """A frozen weight of a model on some device, held in the CPU's memory; page-locked for a CUDA device.

    Attributes:
        held: the tensors that the weight is stored as, on the CPU.
        made: of those tensors, copied, the dense weight.
        flipped: whether the last two dimensions are the other way round.
    """

    held: tuple[Tensor, ...]
    made: Callable[[Sequence[Tensor]], Tensor]
    flipped: bool

    @staticmethod
    def __new__(
        cls,
        held: tuple[Tensor, ...],
        made: Callable[[Sequence[Tensor]], Tensor],
        like: Tensor,
        device: torch.device,
        flipped: bool = False,
    ) -> Self:
        out = Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device)
        out.held, out.made, out.flipped = held, made, flipped
        return out

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """A weight on the CPU."""
        made = weight.of_parts() if isinstance(weight, Stored) else itemgetter(0)
        return cls(parts_of(weight.detach()), made, weight, weight.device)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.held

    def dense(self) -> Tensor:
        """The weight on the model's device."""
        whole = self.made([one.to(self.device, non_blocking=True) for one in self.held])
        return whole.transpose(-2, -1) if self.flipped else whole

    def again(self, fn: Callable[[Tensor], Tensor] = lambda one: one, flip: bool = False) -> "Offloaded":
        return self._like(tuple(map(fn, self.held)), self.device, flip)

    def at(self, device: torch.device) -> "Offloaded":
        """The same weight of a model on another device."""
        locked = device.type == "cuda"
        return self._like(tuple(one.pin_memory() if locked else one for one in self.held), device)

    def _like(self, held: tuple[Tensor, ...], device: torch.device, flip: bool = False) -> "Offloaded":
        like = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")
        like = like.transpose(-2, -1) if flip else like
        return Offloaded(held, self.made, like, device, self.flipped != flip)

    def __repr__(self) -> str:
        return f"Offloaded({tuple(self.shape)}, device={self.device})"


def _moved(weight: Offloaded, *, dtype: Any = None, device: Any = None, **_: Any) -> Offloaded | None:
    return weight.at(torch.device(device or weight.device)) if dtype in (None, weight.dtype) else None


Offloaded.kept = {**Stored.kept, torch.ops.aten._to_copy.default: _moved}


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
