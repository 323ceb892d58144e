"""Norms of operators."""

from torch import Tensor

from .operators import Operator


def detach(op: Operator) -> Operator:
    """The same matrix, as a constant to autograd."""
    return op.map(lambda value: value.detach())


def column_norm(op: Operator) -> Tensor:
    """The 2-norm of every column of W, shape (..., m); by the factors where there are any."""
    return op.column_square_sum().clamp_min(0).sqrt()
