"""Accumulate in place: low-rank terms are added to the frozen product's own result, not to a copy of it."""

from collections.abc import Callable

import torch
from torch import fx

from ...graph.ops import aten
from ...graph.products import linear_and
from ..base import Context, inserted
from ..clean.remove_dead import remove_dead


def accumulate_in_place(graph: fx.Graph, context: Context) -> fx.Graph:
    """Add terms to the result of the linear op whose only readers they are; nobody keeps it for the backward."""
    for linear in graph.find_nodes(op="call_function", target=aten.linear.default):
        result, terms, scales = _terms(linear)
        if not terms:
            continue

        x, weight, bias = (*linear.args, None)[:3]
        with graph.inserting_before(result):
            made = graph.call_function(_summed(scales), (x, weight, bias, *(one for term in terms for one in term)))
        made.meta = dict(result.meta)
        result.replace_all_uses_with(made)
    return remove_dead(graph, context)


def _summed(factors: list[float]) -> Callable[..., torch.Tensor]:
    def summed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *flat: torch.Tensor, **scale):
        return linear_and(x, weight, bias, list(zip(flat[::2], flat[1::2], strict=True)), factors, **scale)

    summed.serves = linear_and
    return summed


def _terms(linear: fx.Node) -> tuple[fx.Node, list[tuple[fx.Node, fx.Node]], list[float]]:
    """The last sum that a linear op's result goes into, the terms and their scales; a term is rows and a factor."""
    total, terms, scales = linear, [], []
    while len(linear.meta["val"].shape) >= 2 and (found := _added(total)):
        total, rows, factor, scale = found
        terms.append((rows, factor))
        scales.append(scale)
    return total, terms, scales


def _added(total: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, float] | None:
    """view_as(addmm(flatten(total), flatten(rows), factor), total), of whose inner nodes no other reads any."""
    flat = next((user for user in total.users if user.target is aten.flatten.using_ints and inserted(user)), None)
    if flat is None or len(flat.users) != 1 or len(total.users) != 2:
        return None
    (add,) = flat.users
    if add.target is not aten.addmm.default or add.args[0] is not flat or len(add.users) != 1 or "beta" in add.kwargs:
        return None
    (result,) = add.users
    if result.target is not aten.view_as.default or result.args != (add, total):
        return None
    return result, add.args[1].args[0], add.args[2], add.kwargs.get("alpha", 1.0)
