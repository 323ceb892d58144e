"""Let tensors that a graph creates follow its inputs' device: the trace wrote its own device into the nodes."""

import torch
from torch import fx

from ..base import Context


def follow_device(graph: fx.Graph, context: Context) -> fx.Graph:
    """Replace every device constant by the device of the first input."""
    inputs = graph.find_nodes(op="placeholder")
    users = [
        node for node in graph.nodes if any(isinstance(a, torch.device) for a in (*node.args, *node.kwargs.values()))
    ]
    if not inputs or not users:
        return graph
    with graph.inserting_after(inputs[-1]):
        device = graph.call_function(getattr, (inputs[0], "device"))
    example = inputs[0].meta.get("val")
    device.meta |= {"nn_module_stack": {}, "val": getattr(example, "device", None)}
    for node in users:
        swap = lambda value: device if isinstance(value, torch.device) else value  # noqa: E731
        node.args = tuple(swap(value) for value in node.args)
        node.kwargs = {key: swap(value) for key, value in node.kwargs.items()}
    return graph
