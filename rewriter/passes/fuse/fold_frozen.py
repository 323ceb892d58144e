"""Fold frozen: what inserted expressions compute of frozen tensors alone is computed once, where it is small."""

import math

import torch
from torch import Tensor, fx

from ..base import PREFIX, Context, changing, inserted

FOLDED = f"{PREFIX}folded."
_SMALLER = 16


def fold_frozen(graph: fx.Graph, context: Context) -> fx.Graph:
    """Compute norms and the like of frozen weights before the first step instead of in every one."""
    if not context.tensors:
        return graph
    frozen: dict[fx.Node, None] = {}
    changes = changing(context)
    for node in graph.nodes:
        sources = node.all_input_nodes
        read = node.op == "get_attr" and node.target in context.tensors and node.target not in changes
        if read or (sources and inserted(node) and _pure(node) and all(one in frozen for one in sources)):
            frozen[node] = None
    known: dict[fx.Node, Tensor] = {}
    first = sum(name.startswith(FOLDED) for name in context.tensors)
    for node in frozen:
        if node.op == "call_function" and _small(node) and any(user not in frozen for user in node.users):
            name = f"{FOLDED}{first + len(context.folded)}"
            with torch.no_grad():
                context.folded[name] = _value(node, context, known).clone()
            with graph.inserting_before(node):
                read = graph.get_attr(name)
            read.meta = dict(node.meta)
            node.replace_all_uses_with(read)
            graph.erase_node(node)
    return graph


def _pure(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in node.target.tags


def _small(node: fx.Node) -> bool:
    """Beside the largest tensor that it comes from."""
    value = node.meta["val"]
    most, stack, seen = 0, [node], set()
    while stack:
        for one in stack.pop().all_input_nodes:
            if one not in seen:
                seen.add(one)
                stack.append(one)
                most = max(most, math.prod(one.meta["val"].shape))
    return isinstance(value, Tensor) and _SMALLER * math.prod(value.shape) <= most


def _value(node: fx.Node, context: Context, known: dict[fx.Node, Tensor]) -> Tensor:
    if node not in known:
        if node.op == "get_attr":
            known[node] = context.tensors[node.target].detach()
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: _value(one, context, known))
            known[node] = node.target(*args, **kwargs)
    return known[node]
