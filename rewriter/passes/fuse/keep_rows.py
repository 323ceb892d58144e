"""Keep rows: a product of flattened rows with a weight is one of the rows as they are, a `MatMul` and not a `Gemm`.

ONNX Runtime's attention nodes are made, and weights in 8 and 4 bits are stored, of `MatMul` alone.
"""

import torch
from torch import fx

from ..base import Context, add_node

aten = torch.ops.aten
_FLATTENS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


def keep_rows(graph: fx.Graph, context: Context) -> fx.Graph:
    """Make `addmm` between a flattening and its inverse a `matmul` and an `add`."""
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        bias, flat, weight = node.args
        if node.kwargs or bias.meta["val"].ndim != 1 or flat.target not in _FLATTENS:
            continue
        rows, backs = flat.args[0], list(node.users)
        shape = (*rows.meta["val"].shape[:-1], node.meta["val"].shape[-1])
        kept = rows.meta["val"].shape[-1] == flat.meta["val"].shape[-1] and all(
            back.target in _FLATTENS and (*back.meta["val"].shape,) == shape for back in backs
        )
        if not kept or not backs:
            continue
        with graph.inserting_before(node):
            product = add_node(graph, context, node, aten.matmul.default, rows, weight)
            summed = add_node(graph, context, node, aten.add.Tensor, product, bias)
        for back in backs:
            back.replace_all_uses_with(summed)
            graph.erase_node(back)
        graph.erase_node(node)
        if not flat.users:
            graph.erase_node(flat)
    return graph
