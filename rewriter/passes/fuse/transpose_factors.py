"""Transpose factors: a product with a narrow factor of many rows reads it as `nn.Linear` reads its weight."""

from torch import fx

from ...graph.ops import MATRIX_PRODUCTS, aten
from ..base import Context, add_node, inserted

COLUMNS = 32  # At more, the two layouts take as long.
STEEPER = 8


def transpose_factors(graph: fx.Graph, context: Context) -> fx.Graph:
    """On a CPU, write x A, A of few columns, as a linear op on a contiguous A^t: its gradient is several times as fast.

    Where x is W^t it is (A^t W)^t: W as it is stored is read in a tenth of the time. A factor of few rows that is a
    transpose is made contiguous, for its gradient too. A copy is as small as its factor.
    """
    if context.device != "cpu":
        return graph
    made: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        sums = node.target is aten.addmm.default
        if not inserted(node) or not (sums or node.target in MATRIX_PRODUCTS):
            continue
        x, factor = node.args[1:3] if sums else node.args
        wide = (narrow := _turned(factor)) is not None and _steep(narrow)
        if not wide and (sums or not _steep(factor)):
            continue
        if factor not in made:
            turned = factor
            if not wide:
                with graph.inserting_after(factor):
                    turned = add_node(graph, context, factor, aten.t.default, factor)
            with graph.inserting_after(turned):
                made[factor] = add_node(graph, context, factor, aten.contiguous.default, turned)
        if wide:
            node.replace_input_with(factor, made[factor])
            continue
        with graph.inserting_before(node):
            if (stored := _turned(x)) is None:
                product = add_node(graph, context, node, aten.linear.default, x, made[factor])
            else:
                product = add_node(graph, context, node, aten.matmul.default, made[factor], stored)
                product = add_node(graph, context, node, aten.t.default, product)
        node.replace_all_uses_with(product)
        for gone in (node, *([x] if stored is not None else ())):
            if not gone.users:
                graph.erase_node(gone)
    return graph


def _steep(factor: fx.Node) -> bool:
    shape = factor.meta["val"].shape
    return len(shape) == 2 and shape[1] <= COLUMNS and shape[0] >= STEEPER * shape[1]


def _turned(node: fx.Node) -> fx.Node | None:
    """The matrix of which a node is the transpose; None where it is no such node."""
    turns = node.target is aten.t.default or (
        node.target is aten.transpose.int and node.meta["val"].ndim == 2 and node.args[1] % 2 != node.args[2] % 2
    )
    return node.args[0] if turns else None
