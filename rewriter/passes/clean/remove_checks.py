"""Remove the assertions that torch.export leaves in a graph: they pin the device and dtype of the trace."""

import torch
from torch import fx

from ..base import Context

CHECKS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten.sym_constrain_range_for_size.default,
    torch.ops.aten.sym_constrain_range.default,
}


def remove_checks(graph: fx.Graph, context: Context) -> fx.Graph:
    """Remove the trace's assertions of device, dtype and layout."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in CHECKS:
            graph.erase_node(node)
    return graph
