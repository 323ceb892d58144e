"""Weights: how the graph reads a parameter, and so how its stored tensor is seen as a matrix."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ..algebra import Dense
from .ops import CONVOLUTIONS, PASSING, PRODUCT_NAMES, ROWS, TRANSPOSES, aten


@dataclass(frozen=True)
class Layout:
    """How a stored tensor is seen as a matrix W of shape (..., n, m) with y = xW; nothing else transposes.

    Attributes:
        stored: the parameter's own shape.
        transposed: stored as (..., m, n), as `nn.Linear` does.
        flattened: the dimensions after the first are one (convolutions: n = inputs x kernel).
        odd: the op that reads it, where that says nothing of inputs and outputs: then the matrix is a guess.
    """

    stored: tuple[int, ...]
    transposed: bool
    flattened: bool = False
    odd: str | None = None

    @property
    def vector(self) -> bool:
        """Whether the parameter is a vector (or a scalar), seen as one row: n = 1."""
        return len(self.stored) < 2

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., n, m)."""
        if self.vector:
            return 1, self.stored[0] if self.stored else 1
        if self.flattened:
            return torch.Size(self.stored[1:]).numel(), self.stored[0]
        *batch, rows, columns = self.stored
        return (*batch, columns, rows) if self.transposed else (*batch, rows, columns)

    def present(self, stored: Tensor) -> Dense:
        """The operator W of a stored tensor."""
        if self.vector:
            return Dense(stored.reshape(self.shape))
        return Dense(stored.flatten(1) if self.flattened else stored, self.transposed)

    def restore(self, w: Tensor) -> Tensor:
        """A matrix W of shape (..., n, m), back in the parameter's own shape."""
        if self.vector or self.flattened:
            return (w if self.vector else w.transpose(-2, -1)).reshape(self.stored)
        return w.transpose(-2, -1) if self.transposed else w


def layout_of(stored: tuple[int, ...], uses: Iterable[tuple[fx.Node, fx.Node]]) -> Layout:
    """The layout that a parameter's uses in the graph imply.

    Args:
        stored: the parameter's shape.
        uses: (get_attr node, node that reads it).
    """
    default, odd = Layout(tuple(stored), transposed=False), None
    for node, user in uses:
        flipped = False
        while user.target in TRANSPOSES | PASSING and user.users:
            flipped ^= user.target in TRANSPOSES
            node, user = user, next(iter(user.users))
        name = getattr(user.target, "__name__", "").split(".")[0]
        if name == "linear" and user.args[1] is node:
            return Layout(tuple(stored), transposed=not flipped)
        if name in CONVOLUTIONS and user.args[1] is node and len(stored) > 2:
            return Layout(tuple(stored), transposed=True, flattened=True)
        if name in PRODUCT_NAMES:
            left = user.args[1 if name in ("addmm", "baddbmm") else 0] is node
            default, odd = Layout(tuple(stored), transposed=flipped != left), ""
        elif name not in ROWS:
            odd = name if odd is None else odd
    return replace(default, odd=odd or None) if len(stored) > 1 else default


def factored(user: fx.Node, weight: fx.Node, layout: Layout) -> tuple[fx.Node, fx.Node | None] | None:
    """(x, bias) where an op is x @ W (+ bias) in a weight's layout; None where phi(W) has to be formed."""
    args, transposed = user.args, layout.transposed
    if len(layout.stored) != 2:
        return None
    if user.target is aten.linear.default and args[1] is weight and args[0] is not weight and transposed:
        return args[0], args[2] if len(args) > 2 else None
    if user.target is aten.addmm.default and args[2] is weight and args[1] is not weight and not transposed:
        return None if user.kwargs else (args[1], args[0])
    if user.target in (aten.mm.default, aten.matmul.default) and args[1] is weight and args[0] is not weight:
        return None if transposed else (args[0], None)
    return None


def uses(graph: fx.Graph, names: Iterable[str]) -> list[tuple[fx.Node, fx.Node]]:
    """(get_attr node, reading node) for a parameter under any of its names, in the graph's order."""
    wanted = set(names)
    pairs = [(node, user) for node in graph.find_nodes(op="get_attr") if node.target in wanted for user in node.users]
    return sorted(pairs, key=lambda pair: pair[1])
