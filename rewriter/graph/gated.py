"""Gated units: an activation times another tensor, whose backward computes the activation again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def gated(activation: Callable[..., Tensor], x: Tensor, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """activation(x, *args, **kwargs) * y, entry by entry; x and y are kept for the backward, the activation is not.

    Args:
        activation: of each entry by itself.
        x, y: of one shape.
    """
    return _Gated.apply(partial(activation, *args, **kwargs) if args or kwargs else activation, x, y)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, activation: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(x, y)
        return activation(x) * y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, y = ctx.saved_tensors
        with torch.enable_grad():
            own = x.detach().requires_grad_()
            made = ctx.activation(own)
        to_x = torch.autograd.grad(made, own, grad * y)[0] if ctx.needs_input_grad[1] else None
        return None, to_x, grad * made.detach() if ctx.needs_input_grad[2] else None
