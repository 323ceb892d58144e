"""Linear operators: sums, products and blocks of matrices, known through their products with others.

An operator stands for a matrix W of shape (..., n, m) in the orientation of the source, y = xW (arXiv 2407.05417v2).
Leading dimensions are a batch of matrices (experts). On the meta device it computes shapes alone.
"""

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

UNBOUNDED = 2**62  # the rank of what has no size of its own


class Operator:
    """A matrix W of shape (..., n, m), known through its products. Every one is a frozen dataclass.

    Composition: `a @ b` multiplies, `a + b` and `a - b` add, `s * a` scales by a number or a tensor.

    Attributes:
        implicit: products with it need less than its entries, so `dense` is not formed where there is another way.
        entrywise: it is known by its n m entries alone, so that products with it form them.
    """

    implicit = False
    entrywise = False

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x @ W (+ bias) for x of shape (..., n); returns (..., m) and never forms a product of two factors."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """W itself, of shape (..., n, m).

        Raises:
            NotImplementedError: the map is no matrix (nonlinear, or with an offset).
        """
        raise NotImplementedError

    def times(self, matrix: Tensor) -> Tensor:
        """matrix @ W for a matrix of shape (..., k, n); raises as `dense`."""
        return matrix @ self.dense()

    def lift(self, matrix: Tensor) -> Tensor:
        """W @ matrix for a matrix of shape (..., m, k); raises as `dense`."""
        return self.dense() @ matrix

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Operator":
        """The same expression with `fn` applied to every tensor in it, in the order of the fields."""
        return replace(self, **{f.name: _mapped(getattr(self, f.name), fn) for f in fields(self)})

    def column_square_sum(self) -> Tensor:
        """The squared 2-norm of every column, shape (..., m)."""
        return torch.linalg.vector_norm(self.dense(), dim=-2).square()

    def rank_bound(self) -> int:
        """A bound on the rank of every matrix of the batch; raises as `dense`."""
        return min(self.dense().shape[-2:])

    def __matmul__(self, other: "Operator") -> "Operator":
        return Product((*_flat(self, Product), *_flat(other, Product)))

    def __add__(self, other: "Operator") -> "Operator":
        return Sum((*_flat(self, Sum), *_flat(other, Sum)))

    def __sub__(self, other: "Operator") -> "Operator":
        return self + Scale(-1.0, other)

    def __rmul__(self, scale: float | Tensor) -> "Operator":
        return Scale(scale, self)


def _mapped(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Operator):
        return value.map(fn)
    if isinstance(value, tuple):
        return tuple(_mapped(one, fn) for one in value)
    return fn(value) if isinstance(value, Tensor) else value


def _flat(op: Operator, kind: type) -> tuple[Operator, ...]:
    return op.operands if type(op) is kind else (op,)


def tensors_of(op: Operator) -> list[Tensor]:
    """All tensors in an expression, in the order in which `Operator.map` meets them."""
    found: list[Tensor] = []
    op.map(lambda value: (found.append(value), value)[1])
    return found


@dataclass(frozen=True)
class Dense(Operator):
    """A matrix given by its entries; `transposed` says that they are stored as (..., m, n), as `nn.Linear` does."""

    stored: Tensor
    transposed: bool = False
    entrywise = True

    def dense(self):
        return self.stored.transpose(-2, -1) if self.transposed else self.stored

    def times(self, matrix):
        if self.transposed and self.stored.ndim == 2:  # The weight is read as it is stored.
            return (self.stored @ matrix.contiguous().transpose(-2, -1)).transpose(-2, -1)
        return matrix @ self.dense()

    def apply(self, x, bias=None):
        if bias is None and not self.transposed:
            return x @ self.stored
        if self.stored.ndim > 2:
            return x @ self.dense() if bias is None else x @ self.dense() + bias
        return F.linear(x, self.stored if self.transposed else self.stored.transpose(-2, -1), bias)


@dataclass(frozen=True)
class Diag(Operator):
    """A diagonal matrix given by its entries, shape (..., n)."""

    entries: Tensor
    implicit = True

    def dense(self):
        return torch.diag_embed(self.entries)

    def apply(self, x, bias=None):
        if bias is None:
            return x * self.entries.unsqueeze(-2)
        return torch.addcmul(bias, x, self.entries.unsqueeze(-2))

    def times(self, matrix):
        return self.apply(matrix)

    def lift(self, matrix):
        return self.entries.unsqueeze(-1) * matrix

    def rank_bound(self):
        return self.entries.shape[-1]


@dataclass(frozen=True)
class Identity(Operator):
    """The identity, of whatever size it meets."""

    implicit = True

    def apply(self, x, bias=None):
        return x if bias is None else x + bias

    def times(self, matrix):
        return matrix

    def lift(self, matrix):
        return matrix

    def rank_bound(self):
        return UNBOUNDED


@dataclass(frozen=True)
class Scale(Operator):
    """s W for a number s, or a tensor of shape (..., 1, 1)."""

    scale: float | Tensor
    operand: Operator

    def dense(self):
        return self.scale * self.operand.dense()

    def apply(self, x, bias=None):
        if isinstance(self.scale, Tensor) and isinstance(self.operand, Product):
            return self.operand.scaled(self.scale).apply(x, bias)
        y = self.scale * self.operand.apply(x)
        return y if bias is None else y + bias

    def times(self, matrix):
        return self.scale * self.operand.times(matrix)

    def lift(self, matrix):
        return self.scale * self.operand.lift(matrix)

    @property
    def implicit(self):
        return self.operand.implicit

    @property
    def entrywise(self):
        return self.operand.entrywise

    def rank_bound(self):
        return self.operand.rank_bound()


@dataclass(frozen=True)
class Product(Operator):
    """W1 @ W2 @ ... @ Wk, applied from the left: x is never wider than the widest factor."""

    operands: tuple[Operator, ...]

    @property
    def factors(self) -> tuple[Operator, ...]:
        """The operands, identities (a dropout is one) apart."""
        return tuple(op for op in self.operands if not isinstance(op, Identity))

    def dense(self):
        operands = self.factors or self.operands
        start = next((i for i, op in enumerate(operands) if not op.implicit), 0)
        right = reduce(lambda matrix, op: op.times(matrix), operands[start + 1 :], operands[start].dense())
        return reduce(lambda matrix, op: op.lift(matrix), reversed(operands[:start]), right)

    def apply(self, x, bias=None):
        *operands, last = _folded(self.operands)
        return last.apply(reduce(lambda y, op: op.apply(y), operands, x), bias)

    def scaled(self, scale: Tensor) -> Operator:
        """s W, the scalar s in the smallest dense factor, so that no result of a row is scaled."""
        dense = [op for op in self.operands if isinstance(op, Dense)]
        if not dense:
            return Product((*self.operands, Scale(scale, Identity())))
        least = min(dense, key=lambda op: op.stored.numel())
        small = replace(least, stored=scale * least.stored)
        return Product(tuple(small if op is least else op for op in self.operands))

    def times(self, matrix):
        return reduce(lambda y, op: op.times(y), self.operands, matrix)

    def lift(self, matrix):
        return reduce(lambda y, op: op.lift(y), reversed(self.operands), matrix)

    @property
    def implicit(self):
        return all(op.implicit for op in self.operands)

    def column_square_sum(self):
        if isinstance(self.operands[-1], Diag):
            head = Product(self.operands[:-1]) if len(self.operands) > 2 else self.operands[0]
            return self.operands[-1].entries.square() * head.column_square_sum()
        return super().column_square_sum()

    def rank_bound(self):
        return min(op.rank_bound() for op in self.operands)


def _folded(operands: tuple[Operator, ...]) -> Sequence[Operator]:
    """The factors with diagonals multiplied into the narrow factor of a low-rank product beside them: it has fewer
    entries than the rows that are applied, and nothing of the rows is kept for the diagonal's gradient."""
    if sum(isinstance(op, Dense) for op in operands) < 2:
        return operands
    out: list[Operator] = []
    for op in operands:
        before = out[-1] if out else None
        if isinstance(op, Dense) and isinstance(before, Diag) and 2 * op.dense().shape[-1] <= op.dense().shape[-2]:
            out[-1] = Dense(before.entries.unsqueeze(-1) * op.dense())
        elif isinstance(op, Diag) and isinstance(before, Dense) and 2 * before.dense().shape[-2] <= op.rank_bound():
            out[-1] = Dense(before.dense() * op.entries.unsqueeze(-2))
        else:
            out.append(op)
    return out


@dataclass(frozen=True)
class Sum(Operator):
    """W1 + W2 + ... + Wk; a bias goes with the first."""

    operands: tuple[Operator, ...]

    def dense(self):
        return reduce(lambda total, op: total + op.dense(), self.operands[1:], self.operands[0].dense())

    def apply(self, x, bias=None):
        """Matrices that are given by their entries are added first: one product with x instead of several."""
        operands = self.operands
        entrywise = [op.entrywise for op in operands]
        if sum(entrywise) > 1:
            given = Sum(tuple(itertools.compress(operands, entrywise)))
            operands = (Dense(given.dense()), *itertools.compress(operands, map(operator.not_, entrywise)))
        return reduce(lambda total, op: total + op.apply(x), operands[1:], operands[0].apply(x, bias))

    def times(self, matrix):
        return reduce(lambda total, op: total + op.times(matrix), self.operands[1:], self.operands[0].times(matrix))

    def lift(self, matrix):
        return reduce(lambda total, op: total + op.lift(matrix), self.operands[1:], self.operands[0].lift(matrix))

    @property
    def implicit(self):
        return any(op.implicit for op in self.operands)

    def rank_bound(self):
        return UNBOUNDED if self.implicit else super().rank_bound()

    def column_square_sum(self):
        """By the binomial formula where the last term is a low-rank product: nothing of size n x m is formed."""
        *head, last = self.operands
        factors = low_rank(last)
        if factors is None:
            return super().column_square_sum()
        base = Sum(tuple(head)) if len(head) > 1 else head[0]
        scale, left, right = factors
        rows = left.transpose(-2, -1)
        cross = (base.times(rows) * right).sum(-2)
        own = ((rows @ left @ right) * right).sum(-2)
        if isinstance(scale, Tensor):
            scale = scale.squeeze(-1)
        return base.column_square_sum() + 2 * scale * cross + scale * scale * own


def low_rank(op: Operator) -> tuple[float | Tensor, Tensor, Tensor] | None:
    """(s, A, B) where the operator is s A B with dense A and B."""
    scale: float | Tensor = 1.0
    while isinstance(op, Scale):
        scale, op = scale * op.scale, op.operand
    if isinstance(op, Product) and len(op.factors) == 2 and all(isinstance(one, Dense) for one in op.factors):
        return scale, op.factors[0].dense(), op.factors[1].dense()
    return None


@dataclass(frozen=True)
class Concat(Operator):
    """Blocks side by side: along "out" [W1 W2 ...], along "in" [W1; W2; ...]. `sizes` are the blocks' widths."""

    operands: tuple[Operator, ...]
    sizes: tuple[int, ...]
    axis: str

    def dense(self):
        return torch.cat([op.dense() for op in self.operands], dim=-1 if self.axis == "out" else -2)

    def apply(self, x, bias=None):
        if self.axis == "out":
            biases = [None] * len(self.sizes) if bias is None else _split(bias, self.sizes)
            return torch.cat([op.apply(x, part) for op, part in zip(self.operands, biases, strict=True)], dim=-1)
        first, *rest = zip(self.operands, _split(x, self.sizes), strict=True)
        return reduce(lambda total, pair: total + pair[0].apply(pair[1]), rest, first[0].apply(first[1], bias))


def _split(value: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Parts of the last dimension. Each is an op of its own, so that a graph of them holds tensors alone."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [value.narrow(-1, start, size) for start, size in zip(starts, sizes, strict=True)]
