"""Keep rows: a product of flattened rows with a weight is one of the rows as they are, a `MatMul` and not a `Gemm`.

ONNX Runtime's attention nodes are made, and weights in 8 and 4 bits are stored, of `MatMul` alone.
"""

import torch
from torch import fx

from ..base import Context, add_node, described

aten = torch.ops.aten
_FLATTENS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


def keep_rows(graph: fx.Graph, context: Context) -> fx.Graph:
    """Make `addmm` between a flattening and its inverse a `matmul` and an `add`."""
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        bias, flat, weight = node.args
        if node.kwargs or bias.meta["val"].ndim != 1 or flat.target not in _FLATTENS:
            continue
        rows, backs = flat.args[0], list(node.users)
        whole, out = rows.meta["val"], node.meta["val"]
        # As expressions: to ask whether symbols are equal may bind them.
        shape = *map(str, whole.shape[:-1]), str(out.shape[-1])
        unmade = all(back.target in _FLATTENS and described(back.meta["val"]) == (shape, out.dtype) for back in backs)
        if not backs or not unmade or str(whole.shape[-1]) != str(flat.meta["val"].shape[-1]):
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
