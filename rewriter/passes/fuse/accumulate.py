"""Accumulate: a product that is scaled and added to a result is one `addmm` on it, without a tensor of its own."""

from torch import fx

from ...graph.ops import MATRIX_PRODUCTS, aten
from ..base import Context, add_node, inserted


def accumulate(graph: fx.Graph, context: Context) -> fx.Graph:
    """Add scaled products of inserted factors to their sum by `addmm`."""
    for add in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if not inserted(add) or add.kwargs or not all(isinstance(one, fx.Node) for one in add.args):
            continue
        total, term = add.args
        product, scale = _scaled(term)
        if product is None or not _adds_up(total, product, add):
            continue
        with graph.inserting_before(add):
            flat = add_node(graph, context, add, aten.flatten.using_ints, total, 0, -2)
            rows = add_node(graph, context, add, aten.flatten.using_ints, product.args[0], 0, -2)
            options = {} if scale == 1 else {"alpha": scale}
            summed = add_node(graph, context, add, aten.addmm.default, flat, rows, product.args[1], **options)
            result = add_node(graph, context, add, aten.view_as.default, summed, total)
        add.replace_all_uses_with(result)
        for node in dict.fromkeys((add, term, product)):
            graph.erase_node(node)
    return graph


def _scaled(term: fx.Node) -> tuple[fx.Node | None, float]:
    """(product, s) of a term s (y B), each op of which has no other reader; s is a number."""
    scale = 1.0
    if term.target is aten.mul.Tensor and type(term.args[1]) in (int, float) and _alone(term):
        term, scale = term.args[0], term.args[1]
    alone = term.target in MATRIX_PRODUCTS and inserted(term) and _alone(term)
    return (term, scale) if alone and not term.kwargs else (None, 1.0)


def _alone(node: fx.Node) -> bool:
    return inserted(node) and len(node.users) == 1


def _adds_up(total: fx.Node, product: fx.Node, add: fx.Node) -> bool:
    """Whether the sum is of equal shapes and one type, of a product with a matrix."""
    values = [node.meta["val"] for node in (total, product, add)]
    shapes, types = {tuple(map(str, value.shape)) for value in values}, {value.dtype for value in values}
    matrix = product.args[1].meta["val"]
    return len(shapes) == len(types) == 1 and matrix.ndim == 2 and values[0].ndim >= 2
