"""Matrices with a structure: blocks, permutations, Hadamard and Kronecker products, sparse changes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .operators import UNBOUNDED, Dense, Operator, Product, Scale, low_rank

_WIDE = 32  # Narrower blocks are multiplied several at a time: a product of so few columns takes as long.


@dataclass(frozen=True)
class Blocks(Operator):
    """A block-diagonal matrix given by its blocks, shape (..., k, b, c)."""

    blocks: Tensor
    implicit = True

    def apply(self, x, bias=None):
        k, b, c = self.blocks.shape[-3:]
        together = max(i for i in range(1, k + 1) if k % i == 0 and i * max(b, c) <= max(b, c, _WIDE))
        blocks = _on_diagonal(self.blocks.unflatten(-3, (k // together, together)))
        rows = x.unflatten(-1, (k // together, together * b))
        y = torch.einsum("...kb,...kbc->...kc", rows, blocks.unsqueeze(-4)).flatten(-2)
        return y if bias is None else y + bias

    def dense(self):
        return _on_diagonal(self.blocks)

    def times(self, matrix):
        return self.apply(matrix)

    def lift(self, matrix):
        k, c = self.blocks.shape[-3], self.blocks.shape[-1]
        return (self.blocks @ matrix.unflatten(-2, (k, c))).flatten(-3, -2)

    def rank_bound(self):
        k, b, c = self.blocks.shape[-3:]
        return k * min(b, c)


def _on_diagonal(blocks: Tensor) -> Tensor:
    """The matrices (..., k b, k c) with blocks (..., k, b, c) on their diagonals."""
    k, b, c = blocks.shape[-3:]
    if k == 1:
        return blocks.squeeze(-3)
    spread = torch.eye(k, dtype=blocks.dtype, device=blocks.device).view(k, 1, k, 1)
    return (blocks.unsqueeze(-2) * spread).reshape(*blocks.shape[:-3], k * b, k * c)


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
    """The product of the entries of two matrices; of two low-rank ones it is of low rank too."""

    left: Operator
    right: Operator

    def dense(self):
        return self.left.dense() * self.right.dense()

    def apply(self, x, bias=None):
        if self.entrywise:
            return Dense(self.dense()).apply(x, bias)
        (s, a, b), (t, c, d) = low_rank(self.left), low_rank(self.right)
        columns = (a.unsqueeze(-1) * c.unsqueeze(-2)).flatten(-2)
        rows = (b.unsqueeze(-2) * d.unsqueeze(-3)).flatten(-3, -2)
        return Scale(s * t, Product((Dense(columns), Dense(rows)))).apply(x, bias)

    @property
    def entrywise(self):
        """Unless the rank r1 r2 of (A1 B1) * (A2 B2) is small: it is one product of A1's columns times A2's then."""
        left, right = low_rank(self.left), low_rank(self.right)
        if left is None or right is None:
            return True
        (_, a, b), (_, c, _) = left, right
        return 2 * a.shape[-1] * c.shape[-1] > min(a.shape[-2], b.shape[-1])

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
class Circulant(Operator):
    """Circulant blocks given by `numbers` (..., q, p, b): entry (i, j) of the block from inputs p to outputs q is
    numbers[q, p, (i - j) mod b]. Products go through Fourier transforms of b entries, in float32 or wider."""

    numbers: Tensor

    def dense(self):
        b = self.numbers.shape[-1]
        steps = torch.arange(b, device=self.numbers.device)
        turned = ((steps.unsqueeze(1) - steps) % b).flatten()
        blocks = self.numbers.index_select(-1, turned).unflatten(-1, (b, b)).movedim(-4, -2)
        return blocks.flatten(-4, -3).flatten(-2)

    def apply(self, x, bias=None):
        p, b = self.numbers.shape[-2:]
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = torch.fft.rfft(x.to(wide).unflatten(-1, (p, b)))
        numbers = torch.fft.rfft(self.numbers.to(wide)).conj()
        product = torch.einsum("...pf,...qpf->...qf", rows, numbers.unsqueeze(-4))
        y = torch.fft.irfft(product, b).flatten(-2).to(x.dtype)
        return y if bias is None else y + bias


@dataclass(frozen=True)
class Patch(Operator):
    """W + S for a sparse S: `values` (..., k) added at the row-major `indices` (..., k) of W.

    W + S is formed for the product: the gradient of S then costs one product, of which k entries are kept, and nothing
    of W's size outlives the step.
    """

    operand: Operator
    indices: Tensor
    values: Tensor
    entrywise = True

    def dense(self):
        w = self.operand.dense()
        return w.flatten(-2).scatter_add(-1, self.indices, self.values).unflatten(-1, w.shape[-2:])

    def apply(self, x, bias=None):
        return Dense(self.dense().transpose(-2, -1), transposed=True).apply(x, bias)
