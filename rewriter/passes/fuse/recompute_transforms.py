"""Recompute transforms: the Fourier transforms of a product are computed again in its backward."""

from collections.abc import Callable

import torch
from torch import fx

from ...graph.ops import VIEWS, aten
from ...graph.products import BLOCKS, transformed
from ..base import Context, changing, comes_from, function_of, inserted

_TRANSFORMS = {aten.fft_rfft.default, aten._conj.default, *VIEWS}


def recompute_transforms(graph: fx.Graph, context: Context) -> fx.Graph:
    """Keep what is transformed for the backward of a product of transforms, not the transforms, which are larger."""
    tuned = changing(context)
    for node in graph.find_nodes(op="call_function", target=aten.einsum.default):
        if not inserted(node) or node.args[0] != BLOCKS or not comes_from(node, tuned):
            continue
        made = [_function(one) for one in node.args[1]]
        if any(read.op == "call_function" and read.target in _TRANSFORMS for _, read in made):
            continue
        (first, x), (second, numbers) = made

        def again(x: torch.Tensor, numbers: torch.Tensor, first=first, second=second) -> torch.Tensor:
            return transformed(first, second, x, numbers)

        with graph.inserting_before(node):
            whole = graph.call_function(again, (x, numbers))
        whole.meta = dict(node.meta)
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
    return graph


def _function(end: fx.Node) -> tuple[Callable, fx.Node]:
    """The transforms and views that a node comes from as a function of what they are of, and that."""
    steps = []
    while end.op == "call_function" and end.target in _TRANSFORMS and len(end.all_input_nodes) == 1:
        steps.insert(0, end)
        end = end.args[0]
    return function_of(steps, [end]), end
