"""Make every `contiguous` a copy: one that looks needless vanishes, and is missed when the op before is decomposed."""

import torch
from torch import fx

from ..base import Context

aten = torch.ops.aten


def copy_contiguous(graph: fx.Graph, context: Context) -> fx.Graph:
    """Make every `contiguous` a `clone` to contiguous strides."""
    for node in graph.find_nodes(op="call_function", target=aten.contiguous.default):
        if not node.kwargs and len(node.args) == 1:
            node.target, node.kwargs = aten.clone.default, {"memory_format": torch.contiguous_format}
    return graph
