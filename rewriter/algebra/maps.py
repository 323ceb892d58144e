"""Maps that are no matrices, or not alone: offsets, nonlinearities, dropout, and frozen parts of a model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import Identity, Operator

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Affine(Operator):
    """x W + b: W with the row b below, applied to (x, 1) as in (12). It is no matrix, so it does not merge."""

    operand: Operator
    offset: Tensor

    def apply(self, x, bias=None):
        y = self.operand.apply(x, self.offset)
        return y if bias is None else y + bias


@dataclass(frozen=True)
class Pointwise(Operator):
    """h(x), a nonlinearity on every entry. It is no matrix, so it does not merge."""

    name: str

    def apply(self, x, bias=None):
        y = NONLINEARITIES[self.name](x)
        return y if bias is None else y + bias


@dataclass(frozen=True)
class Computed(Operator):
    """A frozen part of the model, known by its result on its one input: a layer's attention or feed-forward."""

    result: Tensor

    def apply(self, x, bias=None):
        return self.result if bias is None else self.result + bias


@dataclass(frozen=True)
class Prepend(Operator):
    """concat(P, x W): the rows P, shape (l, m), stand before every sequence of xW. (13)(14)

    With `moves` they take positions too: a model's tables of positions count them.
    """

    rows: Tensor
    operand: Operator
    moves: bool = False

    def apply(self, x, bias=None):
        y = self.operand.apply(x, bias)
        return torch.cat([self.rows.expand(*y.shape[:-2], -1, -1), y], dim=-2)


@dataclass(frozen=True)
class Dropout(Identity):
    """The identity, with dropout on the activation path while training. A graph for evaluation leaves it out."""

    probability: float
    size: int

    def dense(self):
        return torch.eye(self.size)

    def apply(self, x, bias=None):
        y = F.dropout(x, self.probability)
        return y if bias is None else y + bias


def moved_by(op: Operator) -> int:
    """How many positions the rows take that an expression puts before the result of a frozen part."""
    count = 0
    while isinstance(op, Prepend):
        count, op = count + op.moves * len(op.rows), op.operand
    return count


def rows_of(op: Operator) -> Tensor:
    """All rows that an expression puts before the result of a frozen part, in their order, shape (l, m).

    Raises:
        NotImplementedError: it does more, or something else.
    """
    rows = []
    while isinstance(op, Prepend):
        rows.append(op.rows)
        op = op.operand
    if not (rows and isinstance(op, Computed)):
        raise NotImplementedError
    return torch.cat(rows) if len(rows) > 1 else rows[0]
