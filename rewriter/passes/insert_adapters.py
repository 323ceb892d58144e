"""Insert adapters on the attention and feed-forward sublayers of layers, inside the residual."""

import torch
from torch import fx

from ..algebra import Computed
from ..plan import Plan
from ..sublayers import sublayers
from .lowering import Lowering


def insert_adapters(lowering: Lowering, plan: Plan, dtype: torch.dtype) -> fx.Graph:
    """The graph with phi(sublayer) added to the residual in the place of every sublayer of the plan.

    Args:
        lowering: of a traced graph, which is changed in place and returned.
        plan: the sites.
        dtype: storage type of the model.
    """
    graph, wrap = lowering.graph, lowering.wrap
    located = []
    for site in plan.sites:
        if site.kind in ("attention", "feed_forward"):
            for call in sublayers(graph, site.place):
                located.append((site, next(one for one in call if one.kind == site.kind)))
    for site, one in located:
        with lowering.serving(one.add, site):
            phi = lowering.compose(site, Computed(wrap(one.output)), dtype)
            result = phi.apply(wrap(one.input))
        one.add.replace_input_with(one.output, result.node)
    return graph
