"""Share inputs: tuned factors of several sites that read the same x are one factor, so one product.

x A1, x A2, x A3 of query, key and value become x [A1 A2 A3], cut into its parts: x is read once instead of three times,
forward and for the factors' gradients, and its own gradient is one product instead of three and their sum.
"""

from torch import fx

from ...graph.ops import MATRIX_PRODUCTS, aten
from ..base import PREFIX, Context, add_node, inserted

Key = tuple[str, object]


def share_inputs(graph: fx.Graph, context: Context) -> fx.Graph:
    """Make the first products of sites that read the same input one product."""
    tuned = {PREFIX + name for site in context.plan.sites for name in site.tuned}
    groups: dict[fx.Node, dict[fx.Node, Key]] = {}
    for node in graph.nodes:
        if node.target in MATRIX_PRODUCTS and inserted(node) and (key := _factor(node.args[1], tuned)):
            groups.setdefault(node.args[0], {})[node] = key
    order = {node: i for i, node in enumerate(graph.nodes)}
    for x, products in groups.items():
        if len(products) > 1:
            _join(graph, context, x, products, order)
    return graph


def _read(factor: fx.Node) -> list[fx.Node]:
    """The nodes that a factor consists of: a tensor of the module, and a cast."""
    return [factor.args[0], factor] if factor.target is aten.to.dtype else [factor]


def _factor(node: fx.Node, tuned: set[str]) -> Key | None:
    """Which tuned matrix, in which type, an operand is; it can be had anywhere in the graph. None for all others."""
    source = _read(node)[0]
    if not isinstance(source, fx.Node) or source.op != "get_attr" or source.target not in tuned:
        return None
    value = node.meta["val"]
    return (source.target, value.dtype) if value.ndim == 2 else None


def _join(
    graph: fx.Graph, context: Context, x: fx.Node, products: dict[fx.Node, Key], order: dict[fx.Node, float]
) -> None:
    first = next(iter(products))
    factors: dict[Key, fx.Node] = {}
    for node, key in products.items():
        factors.setdefault(key, node.args[1])
    for factor in factors.values():
        for node in _read(factor):
            if order[node] > order[first]:
                first.prepend(node)
                order[node] = order[first] - 0.5  # It may be a factor of another input's product too.
    with graph.inserting_before(first):
        many = len(factors) > 1
        joined = add_node(graph, context, first, aten.cat.default, list(factors.values()), 1) if many else first.args[1]
        whole = add_node(graph, context, first, aten.matmul.default, x, joined)
    start, ends = 0, {}
    for key, factor in factors.items():
        ends[key] = start, start + factor.meta["val"].shape[1]
        start = ends[key][1]
    for node, key in products.items():
        with graph.inserting_before(node):
            part = add_node(graph, context, node, aten.slice.Tensor, whole, -1, *ends[key]) if many else whole
        node.replace_all_uses_with(part)
        graph.erase_node(node)
