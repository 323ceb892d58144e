"""Small masks: dropout keeps which entries it left, a byte each, not the numbers that it multiplied them with."""

import operator

import torch
from torch import fx

from ...graph.ops import aten
from ..base import Context


def small_masks(graph: fx.Graph, context: Context) -> fx.Graph:
    """On a CPU, let dropout keep a byte of each entry for its backward; the entries that it leaves are the same."""
    if context.device != "cpu":
        return graph
    for node in graph.find_nodes(op="call_function", target=aten.dropout.default):
        if node.args[2] is not True or not 0 < node.args[1] < 1:
            continue
        with graph.inserting_before(node):
            both = graph.call_function(aten.native_dropout.default, node.args)
            made = graph.call_function(operator.getitem, (both, 0))
        value = node.meta["val"]
        both.meta = {**node.meta, "val": (value, torch.empty_like(value, dtype=torch.bool))}
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    return graph
