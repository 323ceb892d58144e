"""Frozen weights shared out among processes: each holds a part, and an op that reads one gathers the others' first."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..algebra import Elsewhere, maker_of, parts_of
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


class Sharded(Elsewhere):
    """A frozen weight of which this process holds a part: every process of the group has to ask for it.

    Attributes:
        cuts: how each of the tensors that the weight is stored as is cut.
    """

    together = True
    cuts: tuple[_Cut, ...]

    @classmethod
    def of(cls, weight: Tensor, group: dist.ProcessGroup) -> Self:
        """A weight that all processes of a group have whole."""
        parts = parts_of(weight.detach())
        cuts = tuple(_Cut(one.shape, group) for one in parts)
        held = tuple(cut.part(one) for cut, one in zip(cuts, parts, strict=True))
        like = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        return cls._cut(held, cuts, maker_of(weight), like)

    @classmethod
    def _cut(cls, held: tuple[Tensor, ...], cuts: tuple[_Cut, ...], made: Any, like: Tensor, flipped: bool = False):
        out = cls(held, made, like, held[0].device, flipped)
        out.cuts = cuts
        return out

    def brought(self) -> list[Tensor]:
        return [cut.whole(part) for cut, part in zip(self.cuts, self.held, strict=True)]

    def alike(self, held: tuple[Tensor, ...], like: Tensor, flipped: bool) -> "Sharded":
        return self._cut(held, self.cuts, self.made, like, flipped)

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
