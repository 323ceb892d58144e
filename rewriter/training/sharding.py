"""Frozen weights shared out among processes by FSDP2: each holds a part, and a layer is gathered when an op reads it.

What is gathered stays until an op reads another layer, in the forward as in the backward, so that a pass over the model
gathers each layer once.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Self
from weakref import WeakSet

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ..algebra import Elsewhere, held_bytes, maker_of, parts_of
from ..graph.traced import assign, released
from .parallel import processes
from .recompute import layer_of

_LEAST = 2**8  # Entries: what is smaller is not worth a transfer.
_whole: WeakSet[FSDPModule] = WeakSet()


class Sharded(Elsewhere):
    """A frozen weight of which this process holds a part: every process of the group has to ask for it.

    Attributes:
        layer: has the tensors that the weight is stored as, and those of the layer's other weights.
        names: of them in it.
    """

    together = True
    layer: FSDPModule
    names: tuple[str, ...]

    @classmethod
    def of(cls, weight: Tensor, layer: FSDPModule, names: tuple[str, ...]) -> Self:
        """A weight whose tensors a layer has."""
        like = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        held = tuple(layer.get_parameter(name).to_local() for name in names)
        return cls._of(held, maker_of(weight), like, layer, names)

    @classmethod
    def _of(cls, held: tuple[Tensor, ...], made: Any, like: Tensor, layer: Any, names: Any, flipped: bool = False):
        out = cls(held, made, like, held[0].device, flipped)
        out.layer, out.names = layer, names
        return out

    def brought(self) -> list[Tensor]:
        return [self.layer.get_parameter(name).detach() for name in self.names]

    def dense(self) -> Tensor:
        _gather((self.layer,))
        return _kept(super().dense(), (self,))

    def alike(self, held: tuple[Tensor, ...], like: Tensor, flipped: bool) -> "Sharded":
        return self._of(held, self.made, like, self.layer, self.names, flipped)

    @classmethod
    def computed(cls, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        own = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Sharded)]
        _gather([one.layer for one in own])
        args, kwargs = pytree.tree_map_only(Sharded, Elsewhere.dense, (args, kwargs))
        return pytree.tree_map_only(Tensor, lambda one: _kept(one, own), super().computed(func, args, kwargs))

    def __repr__(self) -> str:
        return f"Sharded({sum(one.numel() for one in self.held)} entries here, {tuple(self.shape)})"


def _gather(layers: Collection[FSDPModule]) -> None:
    """Have the weights of these layers whole, and of no others."""
    for one in [one for one in _whole if one not in layers]:
        one.reshard()
        _whole.discard(one)
    for one in layers:
        if one not in _whole:
            one.unshard()
            _whole.add(one)


def _kept(tensor: Tensor, weights: Iterable[Sharded]) -> Tensor:
    """A tensor that is there too when the gathered weights are gone."""
    gone = {part.untyped_storage().data_ptr() for one in weights for part in one.brought()}
    return tensor.clone() if tensor.untyped_storage().data_ptr() in gone else tensor


def _moved(weight: Sharded, *, dtype: Any = None, device: Any = None, **_: Any) -> Sharded | None:
    here = device is None or torch.device(device).type == weight.device.type
    return weight.again() if here and dtype in (None, weight.dtype) else None


Sharded.kept = {**Elsewhere.kept, torch.ops.aten._to_copy.default: _moved}


def shard(count: int, models: Sequence[nn.Module], without: Collection[str]) -> None:
    """Share the frozen parameters of models out among every `count` processes. In place, a layer at a time.

    Args:
        models: with the same names for the same parameters.
        without: names of parameters that every process keeps whole.
    """
    first, state = models[0], processes()
    order = torch.arange(state.num_processes).view(-1, count)
    mesh = DeviceMesh(state.device.type, order, mesh_dim_names=("data", "shard"))["shard"]
    own = [{name for name, _ in one.named_parameters(remove_duplicate=False)} for one in models]
    for names in _layers({name: one for name, one in first.named_parameters() if not one.requires_grad}, without):
        layer, held = nn.Module(), {}
        for name in names:
            parts = parts_of(first.get_parameter(name).detach())
            held[name] = tuple(f"{len(held)}_{i}" for i in range(len(parts)))
            for key, part in zip(held[name], parts, strict=True):
                layer.register_parameter(key, nn.Parameter(part.contiguous(), requires_grad=False))
        fully_shard(layer, mesh=mesh)
        for name in names:
            weight = first.get_parameter(name)
            made = nn.Parameter(Sharded.of(weight, layer, held[name]), requires_grad=False)
            for model, there in zip(models, own, strict=True):
                if name in there:
                    assign(model, {name: made})
            released(weight)


def shared_bytes(count: int, model: nn.Module, without: Collection[str]) -> int:
    """Bytes of the weights of a model, all frozen, that the fullest of `count` processes holds: its part, what is whole
    everywhere, and the layer that is gathered, for which the largest counts. See `shard`."""
    named = dict(model.named_parameters())
    layers = [[named[name] for name in names] for names in _layers(named, without)]
    sizes = [sum(map(held_bytes, one)) for one in layers]
    parts = [part for one in layers for weight in one for part in parts_of(weight)]
    rows = sum(-(-len(part) // count) * (part.nbytes // len(part)) for part in parts)
    return sum(map(held_bytes, named.values())) - sum(sizes) + rows + max([0, *sizes])


def _layers(named: Mapping[str, Tensor], without: Collection[str]) -> list[list[str]]:
    """The names of what is shared out, by layer; what is of no layer is as one."""
    layers: dict[str, list[str]] = {}
    for name, weight in named.items():
        if name not in without and weight.numel() >= _LEAST:
            layers.setdefault(layer_of(name) or name, []).append(name)
    return list(layers.values())
