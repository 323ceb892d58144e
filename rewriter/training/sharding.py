"""Frozen weights shared out among processes: each holds a part, and an op that reads one gathers the others' first."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..algebra import Stored, parts_of
from ..graph.traced import assign, released
from .parallel import processes

_LEAST = 2**8  # Entries: what is smaller is not worth a transfer.


@dataclass(frozen=True)
class _Cut:
    """How a tensor is cut: its shape, and the processes that have a part each."""

    shape: torch.Size
    group: dist.ProcessGroup

    def part(self, whole: Tensor) -> Tensor:
        """This process's, of one dimension; the last ones are filled up."""
        count = dist.get_world_size(self.group)
        size = -(-whole.numel() // count)
        start = dist.get_rank(self.group) * size
        own = whole.reshape(-1)[start : start + size]
        return torch.cat([own, own.new_zeros(size - len(own))])

    def whole(self, part: Tensor) -> Tensor:
        """Gathered as bytes, since not every type has a transfer of its own."""
        count = dist.get_world_size(self.group)
        made = part.new_empty(len(part) * count)
        dist.all_gather(list(made.view(torch.uint8).chunk(count)), part.view(torch.uint8), group=self.group)
        return made[: math.prod(self.shape)].view(self.shape)


class Sharded(Stored):
    """A frozen weight of which this process holds a part.

    Attributes:
        held: its part of each tensor that the weight is stored as.
        cuts: how each of them is cut.
        made: of those tensors, gathered, the dense weight.
        flipped: whether the last two dimensions are the other way round.
    """

    together = True
    held: tuple[Tensor, ...]
    cuts: tuple[_Cut, ...]
    made: Callable[[Sequence[Tensor]], Tensor]
    flipped: bool

    @staticmethod
    def __new__(
        cls,
        held: tuple[Tensor, ...],
        cuts: tuple[_Cut, ...],
        made: Callable[[Sequence[Tensor]], Tensor],
        like: Tensor,
        flipped: bool = False,
    ) -> Self:
        shape, strides, device = like.shape, like.stride(), held[0].device
        out = Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=like.dtype, device=device)
        out.held, out.cuts, out.made, out.flipped = held, cuts, made, flipped
        return out

    @classmethod
    def of(cls, weight: Tensor, group: dist.ProcessGroup) -> Self:
        """A weight that all processes of a group have whole."""
        parts = parts_of(weight.detach())
        cuts = tuple(_Cut(one.shape, group) for one in parts)
        held = tuple(cut.part(one) for cut, one in zip(cuts, parts, strict=True))
        made = weight.of_parts() if isinstance(weight, Stored) else itemgetter(0)
        return cls(held, cuts, made, torch.empty(weight.shape, dtype=weight.dtype, device="meta"))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.held

    def dense(self) -> Tensor:
        """The weight, gathered: every process of the group has to ask for it."""
        whole = self.made([cut.whole(part) for cut, part in zip(self.cuts, self.held, strict=True)])
        return whole.transpose(-2, -1) if self.flipped else whole

    def again(self, fn: Callable[[Tensor], Tensor] = lambda one: one, flip: bool = False) -> "Sharded":
        like = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")
        like = like.transpose(-2, -1) if flip else like
        return Sharded(tuple(map(fn, self.held)), self.cuts, self.made, like, self.flipped != flip)

    def __repr__(self) -> str:
        return f"Sharded({len(self.held[0])} of {math.prod(self.cuts[0].shape)} entries, {tuple(self.shape)})"


def shard(count: int, models: Sequence[nn.Module], without: Collection[str]) -> None:
    """Share the frozen parameters of models out among every `count` processes. In place, one at a time.

    Args:
        models: with the same names for the same parameters.
        without: names of parameters that every process keeps whole.
    """
    first, group = models[0], _group(count)
    names = [{name for name, _ in one.named_parameters(remove_duplicate=False)} for one in models]
    for name in [name for name, one in first.named_parameters() if not one.requires_grad and name not in without]:
        weight = first.get_parameter(name)
        if weight.numel() < _LEAST:
            continue
        made = nn.Parameter(Sharded.of(weight, group), requires_grad=False)
        for model, own in zip(models, names, strict=True):
            if name in own:
                assign(model, {name: made})
        released(weight)


def _group(count: int) -> dist.ProcessGroup:
    """The `count` processes after each other of which this is one."""
    state = processes()
    starts = range(0, state.num_processes, count)
    made = [dist.new_group(list(range(start, start + count))) for start in starts]
    return made[state.process_index // count]
