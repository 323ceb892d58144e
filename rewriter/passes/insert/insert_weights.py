"""Insert phi(W) at every reader of a transformed weight: factored at linear ops, formed before any other op."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ...algebra import Operator, tensors_of
from ...graph.weights import factored, uses
from ...plan import Site, transformed
from ..base import Context
from ..lower import Lowering, looked_up, site_key


def insert_weights(graph: fx.Graph, context: Context) -> fx.Graph:
    """Put phi(W) in the place of every transformed weight.

    The operator is composed once, before the weight's first reader, and applied by each: what is drawn at random in it
    is one draw for all readers.
    """
    lowering = Lowering(graph, context)
    for weight, sites in context.plan.by_weight().items():
        operator: _Composed | None = None
        formed: fx.Node | None = None
        for node, user in uses(graph, context.tied.get(weight, [weight])):
            if operator is None:
                operator = _Composed(lowering, user, node, sites, context.dtypes[weight])
            call = factored(user, node, sites[0].layout)
            if call is None:
                formed = formed or operator.formed(user)
                user.replace_input_with(node, formed)
                continue
            result = operator.applied(user, *call)
            user.replace_all_uses_with(result)
            graph.erase_node(user)
    return graph


class _Composed:
    """The operator of a weight, its tensors as nodes."""

    def __init__(self, lowering: Lowering, before: fx.Node, read: fx.Node, sites: Sequence[Site], dtype: torch.dtype):
        self.lowering, self.sites, self.label = lowering, sites, sites[0].label
        self.key = (tuple(map(site_key, sites)), dtype)
        # The weight may be read late in the graph but fetched first, so it is fetched where it is used.
        stored = lowering.read(before, read.target, read.meta["val"], self.label)
        leaves = lowering.leaves(before, sites, torch.promote_types(dtype, torch.float32))

        def compose(penalties: list, inputs: list[Tensor], tensors: list[Tensor]) -> tuple[list[Tensor], Operator]:
            lookup = looked_up(sites, tensors, dtype)
            op = transformed(list(sites), inputs[0], lambda site, leaf: lookup(leaf), lowering.training, penalties)
            return tensors_of(op), op

        made = lowering.splice(before, self.label, compose, [stored], list(leaves.values()), ("compose", self.key))
        self.nodes, self.operator = made

    def applied(self, before: fx.Node, x: fx.Node, bias: fx.Node | None) -> fx.Node:
        """x phi(W) + bias."""

        def apply(penalties: list, inputs: list[Tensor], tensors: list[Tensor]) -> tuple[list[Tensor], None]:
            return [self._with(tensors).apply(*inputs)], None

        return self.lowering.splice(before, self.label, apply, [x, bias], self.nodes, ("apply", self.key))[0][0]

    def formed(self, before: fx.Node) -> fx.Node:
        """phi(W), as the weight is stored."""

        def form(penalties: list, inputs: list[Tensor], tensors: list[Tensor]) -> tuple[list[Tensor], None]:
            return [self.sites[0].layout.restore(self._with(tensors).dense())], None

        return self.lowering.splice(before, self.label, form, [], self.nodes, ("form", self.key))[0][0]

    def _with(self, tensors: list[Tensor]) -> Operator:
        values = iter(tensors)
        return self.operator.map(lambda _: next(values))
