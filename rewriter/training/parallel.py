"""Several processes that tune one model, each on its share of every batch: what they sum, gather and agree on.

Where there is one process nothing here does anything.
"""

from collections.abc import Iterable, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes, reduce
from torch import Tensor, nn


def processes() -> PartialState:
    """This process among all that `torchrun` started: its device, its number, and whether it is the one that writes."""
    return PartialState(cpu=not torch.cuda.is_available())


def share(rows: Sequence[int]) -> Sequence[int]:
    """This process's part of a batch; it can be empty."""
    state = processes()
    return rows[state.process_index :: state.num_processes]


def total(values: Tensor) -> Tensor:
    """The sum over all processes."""
    return reduce(values, "sum") if processes().num_processes > 1 else values


def together(rows: Tensor) -> Tensor:
    """The rows of all processes, (n, ...), of which each may have another number; floating point without NaN rows."""
    if processes().num_processes == 1:
        return rows
    padded = gather(pad_across_processes(rows, dim=0, pad_index=torch.nan))
    return padded[~padded.flatten(1).isnan().all(dim=1)]


def each(values: Tensor) -> Tensor:
    """The values of every process, (processes, ...)."""
    return gather(values.unsqueeze(0)) if processes().num_processes > 1 else values.unsqueeze(0)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the sum of all processes' gradients, as one transfer for each type; none stays none."""
    if processes().num_processes == 1:
        return
    parameters = list(parameters)
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=processes().device)
    reached = [p for p, count in zip(parameters, total(there).tolist(), strict=True) if count]
    for dtype in dict.fromkeys(p.dtype for p in reached):
        some = [p for p in reached if p.dtype == dtype]
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in some]
        for p, summed in zip(some, total(torch.cat(flat)).split([p.numel() for p in some]), strict=True):
            p.grad = summed.view_as(p)
