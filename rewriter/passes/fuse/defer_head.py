"""Defer the head: logits over a vocabulary leave the train graph as what they are computed from."""

from functools import partial

import torch
from torch import fx

from ...graph.deferred import Deferred, deferred
from ...graph.ops import aten
from ..base import Context

_PRODUCTS = (aten.linear.default, aten.matmul.default)
_ROWWISE = {
    *_PRODUCTS,
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten.neg.default),
    *(aten.addmm.default, aten.flatten.using_ints, aten.view_as.default),
    *(aten.to.dtype, aten._to_copy.default, aten.alias.default),
}


def defer_head(graph: fx.Graph, context: Context) -> fx.Graph:
    """Compute logits in chunks where the loss needs them: they never exist whole, and of masked tokens not at all."""
    output = graph.output_node()
    if not context.defers:
        return graph
    live = _live(graph)
    for node in output.all_input_nodes:
        found = _head(node, live) if set(node.users) == {output} else None
        if found:
            hidden, nodes = found
            _defer(graph, node, hidden, nodes)
    graph.eliminate_dead_code()
    return graph


def last_alone(graph: fx.Graph) -> fx.Graph:
    """Compute logits, the first output (batch, sequence, vocabulary), of the last position alone: (batch, 1, ...)."""
    logits = graph.output_node().all_input_nodes[0]
    found = _head(logits, _live(graph)) if len(logits.users) == 1 else None
    if found and found[0].meta["val"].ndim == 3:
        hidden, nodes = found
        with graph.inserting_before(nodes[0]):
            last = graph.call_function(aten.slice.Tensor, (hidden, 1, -1, 2**63 - 1))
        for node in nodes:
            node.replace_input_with(hidden, last)
    return graph


def _live(graph: fx.Graph) -> set[fx.Node]:
    """What depends on an input."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _head(logits: fx.Node, live: set[fx.Node]) -> tuple[fx.Node, list[fx.Node]] | None:
    """The nearest hidden states from which logits are computed row by row, through a product that widens them, and the
    nodes that do; None where there are none."""
    order = {node: i for i, node in enumerate(logits.graph.nodes)}
    frontier, nodes, wide = {logits}, [], False
    while not (wide and len(frontier) == 1):
        node = max(frontier, key=order.__getitem__)
        sources = [source for source in node.all_input_nodes if source in live]
        if node.target not in _ROWWISE or not sources or any(not _rowwise(node, source) for source in sources):
            return None
        frontier = (frontier - {node}) | set(sources)
        nodes.append(node)
        wide |= node.target in _PRODUCTS and node.meta["val"].shape[-1] > sources[0].meta["val"].shape[-1]
    (hidden,) = frontier
    return (hidden, nodes[::-1]) if hidden.meta["val"].ndim >= 2 else None


def _rowwise(node: fx.Node, source: fx.Node) -> bool:
    """Whether each row of a node is of the same row of its source, with all leading dimensions as one too."""
    if node.target is aten.flatten.using_ints:
        return node.args[1:] == (0, -2)
    if node.target is aten.view_as.default:
        return len({one.meta["val"].shape[-1] for one in node.args}) == 1
    if node.target is aten.addmm.default:
        return node.args[2] is not source
    one, other = node.meta["val"], source.meta["val"]
    if not isinstance(other, torch.Tensor) or list(map(str, one.shape[:-1])) != list(map(str, other.shape[:-1])):
        return False
    if node.target in _PRODUCTS:
        return node.args[0] is source and node.args[1] is not source and node.args[1].meta["val"].ndim == 2
    return True


def _defer(graph: fx.Graph, logits: fx.Node, hidden: fx.Node, nodes: list[fx.Node]) -> None:
    own = {hidden, *nodes}
    others = list(dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in own))
    part, copies = fx.Graph(), {}
    for source in (hidden, *others):
        copies[source] = part.placeholder(source.name)
    for node in nodes:
        copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(copies[logits])
    forward, nothing = type(fx.GraphModule(torch.nn.Module(), part)).forward, torch.nn.Module()
    width = int(logits.meta["val"].shape[-1])

    def deferred_head(hidden: torch.Tensor, *others: torch.Tensor) -> Deferred:
        return deferred(partial(forward, nothing), width, hidden, *others)

    with graph.inserting_before(graph.output_node()):
        made = graph.call_function(deferred_head, (hidden, *others))
    made.meta = {key: value for key, value in logits.meta.items() if key != "val"}
    logits.replace_all_uses_with(made)
