"""Deferred outputs: logits that are computed where they are needed, in chunks, and never exist whole."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from ..algebra import Stored, as_dense

ENTRIES = 2**22  # Logits of a chunk: 16 MiB in float32; larger ones are no faster on CPUs.

Term = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Deferred:
    """Logits (..., vocabulary) as the hidden states that they are computed from, row by row.

    Attributes:
        head: (hidden (1, n, d), *others) -> logits (1, n, vocabulary).
        hidden: (..., d).
        others: what else the head reads, weights as a rule.
        width: the vocabulary.
        autocast: type of the computation; None: that of the tensors.
    """

    head: Callable[..., Tensor]
    hidden: Tensor
    others: tuple[Tensor, ...]
    width: int
    autocast: torch.dtype | None

    def summed(self, term: Term, targets: Tensor, ignored: int) -> Tensor:
        """The sum of a term over all rows whose target is not ignored, a scalar; no other row is multiplied.

        The gradient of a chunk is taken along with its term, so that the backward only scales it.

        Args:
            term: (logits (n, vocabulary), targets (n,)) -> a scalar that adds up over rows.
            targets: of the shape of the logits before the last dimension.
        """
        return _Summed.apply(self, term, targets.flatten(), ignored, self.hidden, *self.others)

    @torch.no_grad()
    def each(self, term: Term, targets: Tensor, ignored: int) -> Tensor:
        """A term of each row whose target is not ignored, and zeros of the others: (..., k) float64.

        Args:
            term: (logits (n, vocabulary), targets (n,)) -> (n, k) float64.
            targets: of the shape of the logits before the last dimension.
        """
        rows, flat = self.hidden.flatten(0, -2), targets.flatten()
        size, found = max(1, ENTRIES // self.width), None
        for index in (flat != ignored).nonzero().squeeze(1).split(size):
            with self.computing(rows.device.type):
                made = self.head(rows[index][None], *self.others)[0]
            own = term(made, flat[index])
            if found is None:
                found = own.new_zeros(len(flat), own.shape[1])
            found[index] = own
        return found.view(*targets.shape, -1)

    def computing(self, kind: str) -> contextlib.AbstractContextManager:
        """The type of the computation on a kind of device."""
        return torch.autocast(kind, self.autocast) if self.autocast else contextlib.nullcontext()


def deferred(head: Callable[..., Tensor], width: int, hidden: Tensor, *others: Tensor) -> Deferred:
    """The output of a graph in the place of its logits, under the autocast that is in force."""
    kind = hidden.device.type
    own = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
    # How many chunks there are depends on the rows, which each process has of its own.
    others = tuple(as_dense(one) if isinstance(one, Stored) and one.together else one for one in others)
    return Deferred(head, hidden, others, width, own)


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Deferred, term: Term, targets: Tensor, ignored: int, *tensors: Tensor) -> Tensor:
        hidden, *others = (one.detach().requires_grad_(one.requires_grad) for one in tensors)
        wanted = [need for need in ctx.needs_input_grad[4:]]
        rows = hidden.detach().flatten(0, -2)
        grads = [torch.zeros_like(one) if need else None for one, need in zip((rows, *others), wanted, strict=True)]
        # On the meta device no row is known to be ignored.
        kept = torch.arange(len(rows)) if targets.is_meta else (targets != ignored).nonzero().squeeze(1)
        size, value = max(1, ENTRIES // logits.width), torch.zeros((), device=rows.device, dtype=torch.float32)
        for index in kept.to(rows.device).split(size):
            # What a chunk saves is gone with it: hooks on what the step saves are not told.
            with torch.set_grad_enabled(any(wanted)), saved_tensors_hooks(_same, _same):
                part = rows[index].requires_grad_(wanted[0])
                with logits.computing(rows.device.type):
                    made = logits.head(part[None], *others)[0]
                one = term(made, targets[index])
            value = value + one.detach()
            del made
            sources = [source for source, need in zip((part, *others), wanted, strict=True) if need]
            found = iter(torch.autograd.grad(one, sources, allow_unused=True) if sources else ())
            for i, need in enumerate(wanted):
                grad = next(found) if need else None
                if grad is None:
                    continue
                if i == 0:
                    grads[0][index] = grad
                else:
                    grads[i] += grad
        if grads[0] is not None:
            grads[0] = grads[0].view_as(hidden)
        ctx.save_for_backward(*(one for one in grads if one is not None))
        ctx.wanted = wanted
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        saved = iter(ctx.saved_tensors)
        return None, None, None, None, *(next(saved) * grad if need else None for need in ctx.wanted)
