"""Remove inserted ops that change nothing: a product with 1, a cast to the type that is there, dropout of nothing."""

from torch import fx

from ...graph.ops import aten
from ..base import Context, inserted


def remove_identities(graph: fx.Graph, context: Context) -> fx.Graph:
    """Remove inserted products with 1, casts to the same type and dropout of nothing."""
    for node in list(graph.nodes):
        if node.op == "call_function" and inserted(node) and _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph


def _changes_nothing(node: fx.Node) -> bool:
    if node.target is aten.mul.Tensor:
        return type(node.args[1]) in (int, float) and node.args[1] == 1
    if node.target is aten.dropout.default:
        return node.args[1] == 0
    return node.target is aten.to.dtype and len(node.args) == 2 and node.args[1] == node.args[0].meta["val"].dtype
