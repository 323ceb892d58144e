"""Matrices with a structure: blocks, permutations, Hadamard and Kronecker products, sparse changes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .operators import UNBOUNDED, Dense, Operator


@dataclass(frozen=True)
class Blocks(Operator):
    """A block-diagonal matrix given by its blocks, shape (..., k, b, c)."""

    blocks: Tensor
    implicit = True

    def apply(self, x, bias=None):
        k, b = self.blocks.shape[-3], self.blocks.shape[-2]
        y = torch.einsum("...kb,...kbc->...kc", x.unflatten(-1, (k, b)), self.blocks.unsqueeze(-4)).flatten(-2)
        return y if bias is None else y + bias

    def dense(self):
        k, b, c = self.blocks.shape[-3:]
        spread = torch.eye(k, dtype=self.blocks.dtype, device=self.blocks.device).view(k, 1, k, 1)
        return (self.blocks.unsqueeze(-2) * spread).reshape(*self.blocks.shape[:-3], k * b, k * c)

    def times(self, matrix):
        return self.apply(matrix)

    def lift(self, matrix):
        k, c = self.blocks.shape[-3], self.blocks.shape[-1]
        return (self.blocks @ matrix.unflatten(-2, (k, c))).flatten(-3, -2)

    def rank_bound(self):
        k, b, c = self.blocks.shape[-3:]
        return k * min(b, c)


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

    def rank_bound(self):
        return UNBOUNDED


@dataclass(frozen=True)
class Hadamard(Operator):
    """The product of the entries of two matrices."""

    left: Operator
    right: Operator

    def dense(self):
        return self.left.dense() * self.right.dense()

    def apply(self, x, bias=None):
        return Dense(self.dense()).apply(x, bias)

    def rank_bound(self):
        return min(self.left.rank_bound() * self.right.rank_bound(), *self.dense().shape[-2:])


@dataclass(frozen=True)
class Kronecker(Operator):
    """The Kronecker product of a matrix C, (..., p, q), and an operator of `size` inputs: blocks C[i, j] D."""

    left: Tensor
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

    def rank_bound(self):
        return min(self.left.shape[-2:]) * self.right.rank_bound()


@dataclass(frozen=True)
class Patch(Operator):
    """W + S for a sparse S: `values` (..., k) added at the row-major `indices` (..., k) of W.

    W + S is formed for the product: the gradient of S then costs one product, of which k entries are kept, and nothing
    of W's size outlives the step.
    """

    operand: Operator
    indices: Tensor
    values: Tensor

    def dense(self):
        w = self.operand.dense()
        return w.flatten(-2).scatter_add(-1, self.indices, self.values).unflatten(-1, w.shape[-2:])

    def apply(self, x, bias=None):
        return Dense(self.dense().transpose(-2, -1), transposed=True).apply(x, bias)
