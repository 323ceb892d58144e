"""Recompute operands: what tuned tensors are multiplied with is computed again where that is cheap."""

from collections.abc import Callable

import torch
from torch import fx

from ...graph.gated import gated
from ...graph.ops import ADDS, PASSING, VIEWS, aten
from ...graph.products import product_again, scaled_again
from ..base import Context, changing, comes_from, described, function_of, inserted, is_row

# Of each entry or each row by itself, and small beside the products that read what they give.
_CHEAP = {
    aten.gelu.default, aten.silu.default, aten.relu.default, aten.tanh.default, aten.sigmoid.default, aten.mul.Tensor,
    aten.mul.Scalar, aten.pow.Tensor_Scalar, aten.mean.dim, aten.rsqrt.default, aten.layer_norm.default,
    aten.rms_norm.default, aten.div.Tensor, aten.neg.default, *ADDS, *PASSING, *VIEWS,
}  # fmt: skip
_MOST = 24  # Ops of one operand.


def recompute_operands(graph: fx.Graph, context: Context) -> fx.Graph:
    """Where memory is asked for, compute activations and norms again that are kept for tuned factors alone.

    What they are computed from is kept for their own backward.
    """
    if not context.lean:
        return graph
    tuned = changing(context)
    for node in list(graph.nodes):
        if not inserted(node) or not all(isinstance(one, fx.Node) for one in node.args[:2]):
            continue
        if node.target is aten.linear.default and len(node.args) == 2:
            function: Callable = product_again
        elif node.target is aten.mul.Tensor and is_row(node.args[1], node.args[0]):
            function = scaled_again
        else:
            continue
        x, factor = node.args
        found = _region(x) if comes_from(factor, tuned) else None
        if found is not None and factor not in found[1]:
            _replace(graph, node, function, *found)
    return graph


def _region(x: fx.Node) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """The cheap ops that x comes from, in order, and what they read; None where there is none that computes."""
    region: dict[fx.Node, None] = {}
    sources: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node in region or node in sources:
            return
        if node.op != "call_function" or not _cheap(node):
            sources[node] = None
            return
        for one in node.all_input_nodes:
            visit(one)
        region[node] = None

    visit(x)
    computes = any(node.target not in VIEWS | PASSING for node in region)
    return (list(region), list(sources)) if computes and len(region) <= _MOST else None


def _cheap(node: fx.Node) -> bool:
    """Sums of two activations are no such op: residuals are kept, and what is in them is not cheap."""
    if not all(isinstance(one.meta.get("val"), torch.Tensor) for one in node.all_input_nodes):
        return False
    if node.target in ADDS:
        kinds = [described(one.meta["val"]) for one in node.all_input_nodes]
        return len(kinds) < 2 or kinds[0] != kinds[1]
    return node.target in _CHEAP or getattr(node.target, "serves", None) is gated


def _replace(graph: fx.Graph, node: fx.Node, function: Callable, region: list[fx.Node], sources: list[fx.Node]) -> None:
    make = function_of(region, sources)

    def again(x: torch.Tensor, factor: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return function(make, x, factor, *given)

    with graph.inserting_before(node):
        made = graph.call_function(again, (*node.args, *sources))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
