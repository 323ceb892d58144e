"""Group heads: attention reads each key head once for all query heads that share it, and no copies of it."""

import operator

import torch
from torch import fx

from ...graph.ops import SDPA, VIEWS, aten
from ...graph.sublayers import shape_of
from ..base import Context, add_node
from ..clean.remove_dead import remove_dead

# Parts of a tensor that lie in its memory.
_PARTS = {
    operator.getitem, aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default,
    aten.chunk.default, aten.unbind.int,
}  # fmt: skip
_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_BETWEEN = {aten.slice.Tensor, aten.unsqueeze.default, aten.contiguous.default, aten.clone.default}


def group_heads(graph: fx.Graph, context: Context) -> fx.Graph:
    """Let attention repeat keys and values for the query heads that share them, instead of the graph.

    On a GPU they stay repeated: some of PyTorch's fused kernels take no grouped heads there.
    """
    if context.device != "cpu":
        return graph
    for node in graph.find_nodes(op="call_function", target=SDPA):
        if len(node.args) < 3 or node.kwargs.get("enable_gqa"):
            continue
        query, *repeated = node.args[:3]
        sources = [_unrepeated(one) for one in repeated]
        if None in sources:
            continue
        with graph.inserting_before(node):  # A part would keep the whole for the backward.
            sources = [
                add_node(graph, context, one, aten.clone.default, one, memory_format=torch.contiguous_format)
                if _is_part(one)
                else one
                for one in sources
            ]
        node.args = (query, *sources, *node.args[3:])
        node.kwargs = {**node.kwargs, "enable_gqa": True}
    return remove_dead(graph)


def _unrepeated(node: fx.Node) -> fx.Node | None:
    """Of (batch, groups * n, length, width), where each of (batch, groups, length, width) stands n times in a row, the
    latter; None of anything else."""
    if len(_shape(node)) != 4:
        return None
    batch, heads, length, width = _shape(node)
    expanded = node
    while expanded.target in _RESHAPES | _BETWEEN and len(_shape(expanded)) == 4:
        expanded = expanded.args[0]
    if expanded.target is not aten.expand.default or len(_shape(expanded)) != 5:
        return None
    groups, times = _shape(expanded)[1:3]
    single, whole = (batch, groups, "1", length, width), (batch, groups, length, width)
    counted = groups.isdigit() and times.isdigit() and heads == str(int(groups) * int(times))
    if not counted or _shape(expanded) != (batch, groups, times, length, width):
        return None
    source = expanded.args[0]
    while source.target in _BETWEEN and _shape(source) == single:
        source = source.args[0]
    while source.target in _BETWEEN and _shape(source) == whole:
        source = source.args[0]
    return source if _shape(source) == whole else None


def _is_part(node: fx.Node) -> bool:
    """Whether a tensor lies in the memory of a larger one."""
    while node.target in _PARTS | VIEWS - {aten.clone.default, aten.contiguous.default}:
        before = node.args[0]
        if node.target in _PARTS and _shape(node) != _shape(before):
            return True
        node = before
    return False


def _shape(node: fx.Node) -> tuple[str, ...]:
    """As expressions: to ask whether symbols are equal may bind them."""
    return tuple(map(str, shape_of(node)))
