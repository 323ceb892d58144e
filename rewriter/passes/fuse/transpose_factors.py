"""Transpose factors: a product with a narrow factor of many rows reads it as `nn.Linear` reads its weight."""

from torch import fx

from ...graph.ops import MATRIX_PRODUCTS, aten
from ..base import Context, add_node, inserted

COLUMNS = 32  # At more, the two layouts take as long.
STEEPER = 8


def transpose_factors(graph: fx.Graph, context: Context) -> fx.Graph:
    """On a CPU, write x A, A of few columns, as a linear op on a contiguous A^t: its gradient is several times as fast.

    The copy of A is as small as A.
    """
    if context.device != "cpu":
        return graph
    made: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target in MATRIX_PRODUCTS and inserted(node) and _steep(node.args[1]):
            x, factor = node.args
            if factor not in made:
                with graph.inserting_after(factor):
                    turned = add_node(graph, context, factor, aten.t.default, factor)
                with graph.inserting_after(turned):
                    made[factor] = add_node(graph, context, factor, aten.contiguous.default, turned)
            with graph.inserting_before(node):
                product = add_node(graph, context, node, aten.linear.default, x, made[factor])
            node.replace_all_uses_with(product)
            graph.erase_node(node)
    return graph


def _steep(factor: fx.Node) -> bool:
    shape = factor.meta["val"].shape
    return len(shape) == 2 and shape[1] <= COLUMNS and shape[0] >= STEEPER * shape[1]
