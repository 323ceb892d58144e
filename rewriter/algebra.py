"""The algebra of linear operators in which every method is written.

An operator stands for a matrix W of shape (..., n, m) in the orientation of the source, y = xW (arXiv 2407.05417v2).
Leading dimensions are a batch of matrices (experts). The leaves hold `torch.Tensor` or `torch.fx.Proxy` alike, so the
same code computes a result, or writes nodes into a graph (lowering). On the meta device it computes shapes alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

Value = Tensor | Proxy
NONLINEARITIES: dict[str, Callable[[Value], Value]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Operator:
    """A matrix W of shape (..., n, m), known through its products.

    Composition: `a @ b` multiplies, `a + b` and `a - b` add, `s * a` scales by a number or a tensor.

    Attributes:
        implicit: products with it need less than its entries, so `dense` is not formed where there is another way.
    """

    implicit = False

    def apply(self, x: Value, bias: Value | None = None) -> Value:
        """x @ W (+ bias) for x of shape (..., n); returns (..., m) and never forms a product of two factors."""
        raise NotImplementedError

    def dense(self) -> Value:
        """W itself, of shape (..., n, m).

        Raises:
            NotImplementedError: the map is no matrix (nonlinear, or with an offset).
        """
        raise NotImplementedError

    def add_to(self, acc: Value, x: Value, scale: float | Value = 1.0) -> Value:
        """acc + scale * (x @ W), for acc of shape (..., m)."""
        return acc + scale * self.apply(x)

    def times(self, matrix: Value) -> Value:
        """matrix @ W for a matrix of shape (..., k, n); raises as `dense`."""
        return matrix @ self.dense()

    def lift(self, matrix: Value) -> Value:
        """W @ matrix for a matrix of shape (..., m, k); raises as `dense`."""
        return self.dense() @ matrix

    def map(self, fn: Callable[[Value], Value]) -> "Operator":
        """The same expression with `fn` applied to every leaf."""
        raise NotImplementedError

    def column_square_sum(self) -> Value:
        """The squared 2-norm of every column, shape (..., m)."""
        return torch.linalg.vector_norm(self.dense(), dim=-2).square()

    def __matmul__(self, other: "Operator") -> "Operator":
        return Product((*_flat(self, Product), *_flat(other, Product)))

    def __add__(self, other: "Operator") -> "Operator":
        return Sum((*_flat(self, Sum), *_flat(other, Sum)))

    def __sub__(self, other: "Operator") -> "Operator":
        return self + Scale(-1.0, other)

    def __rmul__(self, scale: float | Value) -> "Operator":
        return Scale(scale, self)


def _flat(op: Operator, kind: type) -> tuple[Operator, ...]:
    return op.operands if type(op) is kind else (op,)


@dataclass(frozen=True)
class Dense(Operator):
    """A matrix given by its entries; `transposed` says that they are stored as (..., m, n), as `nn.Linear` does."""

    stored: Value
    transposed: bool = False

    def dense(self):
        return self.stored.transpose(-2, -1) if self.transposed else self.stored

    def apply(self, x, bias=None):
        if bias is None and not self.transposed:
            return x @ self.stored
        if isinstance(self.stored, Tensor) and self.stored.ndim > 2:
            return x @ self.dense() if bias is None else x @ self.dense() + bias
        return F.linear(x, self.stored if self.transposed else self.stored.transpose(-2, -1), bias)

    def add_to(self, acc, x, scale=1.0):
        batched = isinstance(self.stored, Tensor) and self.stored.ndim > 2
        if batched or not isinstance(scale, int | float):
            return super().add_to(acc, x, scale)
        return torch.addmm(acc.flatten(0, -2), x.flatten(0, -2), self.dense(), alpha=scale).view_as(acc)

    def map(self, fn):
        return replace(self, stored=fn(self.stored))


@dataclass(frozen=True)
class Diag(Operator):
    """A diagonal matrix given by its entries, shape (..., n)."""

    entries: Value
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

    def map(self, fn):
        return Diag(fn(self.entries))


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

    def map(self, fn):
        return self


@dataclass(frozen=True)
class Blocks(Operator):
    """A block-diagonal matrix given by its blocks, shape (..., k, b, c)."""

    blocks: Value
    implicit = True

    def apply(self, x, bias=None):
        k, b = self.blocks.shape[-3], self.blocks.shape[-2]
        y = torch.einsum("...kb,...kbc->...kc", x.unflatten(-1, (k, b)), self.blocks.unsqueeze(-4)).flatten(-2)
        return y if bias is None else y + bias

    def times(self, matrix):
        return self.apply(matrix)

    def lift(self, matrix):
        k, c = self.blocks.shape[-3], self.blocks.shape[-1]
        return (self.blocks @ matrix.unflatten(-2, (k, c))).flatten(-3, -2)

    def map(self, fn):
        return Blocks(fn(self.blocks))


@dataclass(frozen=True)
class Shuffle(Operator):
    """A permutation: every run of a * b * width entries, seen as (a, b, width), becomes (b, a, width)."""

    a: int
    b: int
    width: int
    implicit = True

    def apply(self, x, bias=None):
        y = x.unflatten(-1, (-1, self.a, self.b, self.width)).transpose(-3, -2).flatten(-4)
        return y if bias is None else y + bias

    def times(self, matrix):
        return self.apply(matrix)

    def lift(self, matrix):
        back = Shuffle(self.b, self.a, self.width)
        return back.apply(matrix.transpose(-2, -1)).transpose(-2, -1)

    def map(self, fn):
        return self


@dataclass(frozen=True)
class Hadamard(Operator):
    """The product of the entries of two matrices."""

    left: Operator
    right: Operator

    def dense(self):
        return self.left.dense() * self.right.dense()

    def apply(self, x, bias=None):
        return Dense(self.dense()).apply(x, bias)

    def map(self, fn):
        return Hadamard(self.left.map(fn), self.right.map(fn))


@dataclass(frozen=True)
class Kronecker(Operator):
    """The Kronecker product of a matrix C, (..., p, q), and an operator of `size` inputs: blocks C[i, j] D."""

    left: Value
    right: Operator
    size: int

    def dense(self):
        c, d = self.left, self.right.dense()
        return (c.unsqueeze(-2).unsqueeze(-1) * d.unsqueeze(-2).unsqueeze(-4)).flatten(-4, -3).flatten(-2)

    def apply(self, x, bias=None):
        p = self.left.shape[-2]
        rows = x.unflatten(-1, (p, self.size)).flatten(-3, -2)
        inner = self.right.apply(rows).unflatten(-2, (-1, p)).transpose(-2, -1)
        y = (inner @ self.left.unsqueeze(-3)).transpose(-2, -1).flatten(-2)
        return y if bias is None else y + bias

    def map(self, fn):
        return Kronecker(fn(self.left), self.right.map(fn), self.size)


@dataclass(frozen=True)
class Affine(Operator):
    """x W + b: W with the row b below, applied to (x, 1) as in (12). It is no matrix, so it does not merge."""

    operand: Operator
    offset: Value

    def apply(self, x, bias=None):
        y = self.operand.apply(x, self.offset)
        return y if bias is None else y + bias

    def map(self, fn):
        return Affine(self.operand.map(fn), fn(self.offset))


@dataclass(frozen=True)
class Pointwise(Operator):
    """h(x), a nonlinearity on every entry. It is no matrix, so it does not merge."""

    name: str

    def apply(self, x, bias=None):
        y = NONLINEARITIES[self.name](x)
        return y if bias is None else y + bias

    def map(self, fn):
        return self


@dataclass(frozen=True)
class Computed(Operator):
    """A frozen part of the model, known by its result on its one input: a layer's attention or feed-forward."""

    result: Value

    def apply(self, x, bias=None):
        return self.result if bias is None else self.result + bias

    def map(self, fn):
        return Computed(fn(self.result))


@dataclass(frozen=True)
class Prepend(Operator):
    """concat(P, x W): the rows P, shape (l, m), stand before every sequence of xW. (13)(14)"""

    rows: Value
    operand: Operator

    def apply(self, x, bias=None):
        y = self.operand.apply(x, bias)
        # A proxy's shape can't be unpacked, but broadcasting gives every sequence its rows.
        return torch.cat([self.rows + torch.zeros_like(y[..., :1, :]), y], dim=-2)

    def map(self, fn):
        return Prepend(fn(self.rows), self.operand.map(fn))


@dataclass(frozen=True)
class Patch(Operator):
    """W + S for a sparse S: `values` (..., k) added at the row-major `indices` (..., k) of W.

    W + S is formed for the product: the gradient of S then costs one product, of which k entries are kept, and nothing
    of W's size outlives the step.
    """

    operand: Operator
    indices: Value
    values: Value

    def dense(self):
        w = self.operand.dense()
        return w.flatten(-2).scatter_add(-1, self.indices, self.values).unflatten(-1, w.shape[-2:])

    def apply(self, x, bias=None):
        return Dense(self.dense().transpose(-2, -1), transposed=True).apply(x, bias)

    def map(self, fn):
        return Patch(self.operand.map(fn), self.indices, fn(self.values))


@dataclass(frozen=True)
class Dropout(Operator):
    """The identity, with dropout on the activation path while training. It leaves no trace in `dense`."""

    probability: float
    size: int

    def dense(self):
        return torch.eye(self.size)

    def apply(self, x, bias=None):
        y = torch.ops.aten.dropout.default(x, self.probability, True)
        return y if bias is None else y + bias

    def times(self, matrix):
        return matrix

    def lift(self, matrix):
        return matrix

    def map(self, fn):
        return self


@dataclass(frozen=True)
class Scale(Operator):
    """s W for a number s, or a tensor of shape (..., 1, 1)."""

    scale: float | Value
    operand: Operator

    def dense(self):
        return self.scale * self.operand.dense()

    def apply(self, x, bias=None):
        y = self.scale * self.operand.apply(x)
        return y if bias is None else y + bias

    def times(self, matrix):
        return self.scale * self.operand.times(matrix)

    def lift(self, matrix):
        return self.scale * self.operand.lift(matrix)

    @property
    def implicit(self):
        return self.operand.implicit

    def add_to(self, acc, x, scale=1.0):
        return self.operand.add_to(acc, x, scale * self.scale)

    def map(self, fn):
        scale = self.scale if isinstance(self.scale, int | float) else fn(self.scale)
        return Scale(scale, self.operand.map(fn))


@dataclass(frozen=True)
class Product(Operator):
    """W1 @ W2 @ ... @ Wk, applied from the left: x is never wider than the widest factor."""

    operands: tuple[Operator, ...]

    def _head(self, x: Value) -> Value:
        return reduce(lambda y, op: op.apply(y), self.operands[:-1], x)

    def dense(self):
        operands = [op for op in self.operands if not isinstance(op, Dropout)]
        start = next((i for i, op in enumerate(operands) if not op.implicit), 0)
        right = reduce(lambda matrix, op: op.times(matrix), operands[start + 1 :], operands[start].dense())
        return reduce(lambda matrix, op: op.lift(matrix), reversed(operands[:start]), right)

    def apply(self, x, bias=None):
        return self.operands[-1].apply(self._head(x), bias)

    def times(self, matrix):
        return reduce(lambda y, op: op.times(y), self.operands, matrix)

    def lift(self, matrix):
        return reduce(lambda y, op: op.lift(y), reversed(self.operands), matrix)

    @property
    def implicit(self):
        return all(op.implicit for op in self.operands)

    def add_to(self, acc, x, scale=1.0):
        return self.operands[-1].add_to(acc, self._head(x), scale)

    def map(self, fn):
        return Product(tuple(op.map(fn) for op in self.operands))

    def column_square_sum(self):
        if isinstance(self.operands[-1], Diag):
            head = Product(self.operands[:-1]) if len(self.operands) > 2 else self.operands[0]
            return self.operands[-1].entries.square() * head.column_square_sum()
        return super().column_square_sum()


@dataclass(frozen=True)
class Sum(Operator):
    """W1 + W2 + ... + Wk. The later terms accumulate into the first one's result."""

    operands: tuple[Operator, ...]

    def dense(self):
        return reduce(lambda acc, op: acc + op.dense(), self.operands[1:], self.operands[0].dense())

    def apply(self, x, bias=None):
        return reduce(lambda acc, op: op.add_to(acc, x), self.operands[1:], self.operands[0].apply(x, bias))

    def times(self, matrix):
        return reduce(lambda acc, op: acc + op.times(matrix), self.operands[1:], self.operands[0].times(matrix))

    def lift(self, matrix):
        return reduce(lambda acc, op: acc + op.lift(matrix), self.operands[1:], self.operands[0].lift(matrix))

    @property
    def implicit(self):
        return any(op.implicit for op in self.operands)

    def map(self, fn):
        return Sum(tuple(op.map(fn) for op in self.operands))

    def column_square_sum(self):
        """By the binomial formula where the last term is a low-rank product: nothing of size n x m is formed."""
        *head, last = self.operands
        factors = _low_rank(last)
        if factors is None:
            return super().column_square_sum()
        base = Sum(tuple(head)) if len(head) > 1 else head[0]
        scale, left, right = factors
        rows = left.transpose(-2, -1)
        cross = (base.times(rows) * right).sum(-2)
        own = ((rows @ left @ right) * right).sum(-2)
        if not isinstance(scale, int | float):
            scale = scale.squeeze(-1)
        return base.column_square_sum() + 2 * scale * cross + scale * scale * own


def _low_rank(op: Operator) -> tuple[float | Value, Value, Value] | None:
    """(s, A, B) where the operator is s A B with dense A and B."""
    scale: float | Value = 1.0
    while isinstance(op, Scale):
        scale, op = scale * op.scale, op.operand
    if not isinstance(op, Product):
        return None
    factors = [factor for factor in op.operands if not isinstance(factor, Dropout)]
    if len(factors) == 2 and all(isinstance(factor, Dense) for factor in factors):
        return scale, factors[0].dense(), factors[1].dense()
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
            biases = [None] * len(self.sizes) if bias is None else bias.split(self.sizes, dim=-1)
            return torch.cat(
                [op.apply(x, part) for op, part in zip(self.operands, _items(biases, len(self.sizes)), strict=True)],
                dim=-1,
            )
        parts = _items(x.split(self.sizes, dim=-1), len(self.sizes))
        first, *rest = zip(self.operands, parts, strict=True)
        return reduce(lambda acc, pair: pair[0].add_to(acc, pair[1]), rest, first[0].apply(first[1], bias))

    def map(self, fn):
        return replace(self, operands=tuple(op.map(fn) for op in self.operands))


def _items(values: Value, count: int) -> list[Value]:
    """A proxy can't be iterated, but it can be indexed."""
    return [values[i] for i in range(count)]


def detach(op: Operator) -> Operator:
    """The same matrix, as a constant to autograd."""
    return op.map(lambda value: value.detach())


def column_norm(op: Operator) -> Value:
    """The 2-norm of every column of W, shape (..., m); by the factors where there are any."""
    return op.column_square_sum().clamp_min(0).sqrt()
