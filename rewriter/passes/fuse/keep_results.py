"""Keep results: of a product's result that is scaled by tuned numbers the backward reads the scaled one."""

from collections.abc import Callable

import torch
from torch import fx

from ...graph.ops import VIEWS, aten
from ...graph.products import linear_and
from ..base import Context, changing, comes_from, inserted, is_row


def keep_results(graph: fx.Graph, context: Context) -> fx.Graph:
    """On a CPU, scale a linear op's result in place, and keep z = y * d + b for the gradient of d, not y."""
    if context.device != "cpu":
        return graph
    tuned = changing(context)
    for node in list(graph.nodes):
        if node.target is aten.mul.Tensor and inserted(node):
            (y, scale), offset = node.args, None
        elif node.target is aten.addcmul.default and inserted(node) and not node.kwargs:
            offset, y, scale = node.args
        else:
            continue
        if not (_is_result(y) and is_row(scale, y) and comes_from(scale, tuned)) or _overwritten(node):
            continue
        product, given = (linear_and, (*y.args, None)[:3]) if y.target is aten.linear.default else (y.target, y.args)
        with graph.inserting_before(node):
            made = graph.call_function(_with_scale(product), (scale, offset, *given))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        graph.erase_node(y)
    return graph


def _with_scale(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def scaled_sum(scale: torch.Tensor, offset: torch.Tensor | None, *given: torch.Tensor) -> torch.Tensor:
        return product(*given, scale=scale, offset=offset)

    return scaled_sum


def _is_result(y: object) -> bool:
    """Whether it is a linear op's result that nobody else reads, so that it may be overwritten."""
    made = isinstance(y, fx.Node) and (
        y.target is aten.linear.default or getattr(y.target, "serves", None) is linear_and
    )
    exact = made and y.meta["val"].dtype in (torch.float32, torch.float64)
    return exact and len(y.users) == 1 and len(y.meta["val"].shape) >= 2


def _overwritten(node: fx.Node) -> bool:
    """Whether an op changes a result, or a view of it, in place: it could not be kept."""
    users = list(node.users)
    for user in users:
        if user.target in VIEWS:
            users += user.users
        elif getattr(getattr(user.target, "_schema", None), "is_mutable", False):
            return True
    return False
