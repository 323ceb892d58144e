"""Recompute gates: of an activation times another tensor the backward computes the activation again."""

from collections.abc import Hashable

import torch
from torch import fx

from ...graph.gated import gated
from ...graph.ops import aten
from ..base import Context, described

_ACTIVATIONS = {
    aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default, aten.mish.default,
}  # fmt: skip


def recompute_gates(graph: fx.Graph, context: Context) -> fx.Graph:
    """Keep what gated units read for the backward, and compute their activations again there."""
    for mul in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        for gate, other in (mul.args, mul.args[::-1]):
            if _is_gate(gate) and isinstance(other, fx.Node) and len({_kind(one) for one in (gate, other, mul)}) == 1:
                _replace(graph, mul, gate, other)
                break
    return graph


def _is_gate(gate: object) -> bool:
    alone = isinstance(gate, fx.Node) and gate.target in _ACTIVATIONS and len(gate.users) == 1
    return alone and not any(isinstance(one, fx.Node) for one in (*gate.args[1:], *gate.kwargs.values()))


def _kind(node: fx.Node) -> Hashable:
    return described(node.meta["val"])


def _replace(graph: fx.Graph, mul: fx.Node, gate: fx.Node, other: fx.Node) -> None:
    activation, (source, *rest), options = gate.target, gate.args, dict(gate.kwargs)

    def gated_unit(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return gated(activation, x, y, *rest, **options)

    gated_unit.serves = gated
    with graph.inserting_before(mul):
        made = graph.call_function(gated_unit, (source, other))
    made.meta = dict(mul.meta)
    mul.replace_all_uses_with(made)
    graph.erase_node(mul)
    graph.erase_node(gate)
