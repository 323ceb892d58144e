"""Products of training steps that keep less for their backward, or write less, than PyTorch's own."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Make = Callable[..., Tensor]


LEAST = 1e-3  # Of a scale's entries, by which the scaled tensor is had from its result.


def linear_and(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    terms: Sequence[tuple[Tensor, Tensor]] = (),
    factors: Sequence[float] = (),
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """z = (x weight^t + bias + sum of s y B over the terms) * scale + offset, in the first product's memory.

    For the scale's gradient z is kept, which what reads it often keeps too, not what is scaled: it is the sum of
    dz (z - offset) / scale. Where an entry of the scale is below `LEAST`, and under `torch.compile` or autocast, it is
    kept all the same.

    Args:
        x: (..., n), float32 or wider where there is a scale.
        weight: (m, n), as `nn.Linear` stores it.
        terms: y of shape (..., r) and B of shape (r, m).
        factors: s of each term.
        scale: (m) or (1, m).
        offset: (m).
    """
    total = F.linear(x.flatten(0, -2), weight, bias)
    for (y, factor), s in zip(terms, factors, strict=True):
        total.addmm_(y.flatten(0, -2).to(total.dtype), factor.to(total.dtype), alpha=s)
    if scale is not None:
        total = _scaled(total, scale, offset)
    return total.view(*x.shape[:-1], total.shape[-1])


def _scaled(y: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    plain = torch.compiler.is_compiling() or y.dtype != scale.dtype
    if plain or not (scale.is_meta or bool((scale.detach().abs() >= LEAST).all())):
        return y * scale if offset is None else torch.addcmul(offset, y, scale)
    return _Scaled.apply(y, scale, offset)


class _Scaled(torch.autograd.Function):
    """y * scale + offset, in y's memory."""

    @staticmethod
    def forward(ctx, y: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        y.mul_(scale)
        if offset is not None:
            y.add_(offset)
        ctx.mark_dirty(y)
        ctx.save_for_backward(scale, offset, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        scale, offset, z = ctx.saved_tensors
        product = grad * z
        to_scale = to_offset = None
        if ctx.needs_input_grad[1]:
            to_scale = product.sum(0)
            if offset is not None:
                to_scale = to_scale.addcmul_(grad.sum(0), offset, value=-1)
            to_scale = to_scale.view_as(scale) / scale
        if ctx.needs_input_grad[2]:
            to_offset = grad.sum(0)
        to_y = torch.mul(grad, scale, out=product) if ctx.needs_input_grad[0] else None
        return to_y, to_scale, to_offset


def product_again(make: Make, x: Tensor, factor: Tensor, *sources: Tensor) -> Tensor:
    """x factor^t, of which the backward computes x = make(*sources) again; x is not kept.

    Args:
        x: (..., n).
        factor: (r, n).
    """
    return _Again.apply(_PRODUCT, make, x, factor, *sources)


def scaled_again(make: Make, x: Tensor, scale: Tensor, *sources: Tensor) -> Tensor:
    """x * scale, of which the backward computes x = make(*sources) again; x is not kept.

    Args:
        x: (..., n).
        scale: (n) or (1, n).
    """
    return _Again.apply(_SCALING, make, x, scale, *sources)


BLOCKS = "...pf,...qpf->...qf"


def transformed(first: Make, second: Make, x: Tensor, numbers: Tensor) -> Tensor:
    """The products of blocks of first(x) (..., p, f) with second(numbers) (1, q, p, f), each entry f by itself; x and
    numbers are kept for the backward, what is made of them is not."""
    return _Transformed.apply(first, second, x, numbers)


class _Transformed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first: Make, second: Make, x: Tensor, numbers: Tensor) -> Tensor:
        ctx.first, ctx.second = first, second
        ctx.save_for_backward(x, numbers)
        return torch.einsum(BLOCKS, first(x), second(numbers))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, numbers = ctx.saved_tensors
        to_x = to_numbers = None
        with torch.enable_grad():
            own, given = x.detach().requires_grad_(), numbers.detach().requires_grad_()
            left, right = ctx.first(own), ctx.second(given)
        if ctx.needs_input_grad[2]:
            to_left = torch.einsum("...qf,...qpf->...pf", grad, right.detach().conj())
            (to_x,) = torch.autograd.grad(left, own, to_left)
        if ctx.needs_input_grad[3]:
            rows = left.detach().conj().flatten(0, -3)
            to_right = torch.einsum("tqf,tpf->qpf", grad.flatten(0, -3), rows).view_as(right)
            (to_numbers,) = torch.autograd.grad(right, given, to_right)
        return None, None, to_x, to_numbers


class _Op(NamedTuple):
    """An op of x and a factor.

    Attributes:
        result: of (x, factor).
        to_x: of (gradient, factor).
        to_factor: of (gradient, x), to be summed to the factor's shape.
    """

    result: Callable[[Tensor, Tensor], Tensor]
    to_x: Callable[[Tensor, Tensor], Tensor]
    to_factor: Callable[[Tensor, Tensor], Tensor]


_PRODUCT = _Op(F.linear, torch.matmul, lambda grad, x: grad.flatten(0, -2).t() @ x.flatten(0, -2))
_SCALING = _Op(torch.mul, torch.mul, torch.mul)


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op: _Op, make: Make, x: Tensor, factor: Tensor, *sources: Tensor) -> Tensor:
        ctx.op, ctx.make = op, make
        ctx.save_for_backward(factor, *sources)
        return op.result(x, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        factor, *sources = ctx.saved_tensors
        to_x = to_factor = None
        if ctx.needs_input_grad[2]:
            to_x = ctx.op.to_x(grad, factor.to(grad.dtype))
        if ctx.needs_input_grad[3]:
            to_factor = ctx.op.to_factor(grad, ctx.make(*sources).to(grad.dtype)).sum_to_size(factor.shape)
        return None, None, to_x, to_factor, *[None] * len(sources)
