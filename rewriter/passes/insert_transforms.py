"""Insert phi(W) at every consumer of a transformed weight: factored at linear ops, formed before any other op."""

import torch
from torch import fx

from ..algebra import Operator
from ..plan import Plan, transformed, uses
from ..sites import factored
from .lowering import Lowering


def insert_transforms(
    lowering: Lowering, plan: Plan, tied: dict[str, list[str]], dtypes: dict[str, torch.dtype]
) -> fx.Graph:
    """The graph with every parameter of the plan transformed; the tensors are read from `subspan.<leaf>`.

    Args:
        lowering: of a traced graph, which is changed in place and returned.
        plan: the sites.
        tied: first name -> all names of a tied weight.
        dtypes: parameter name -> storage type; wider tuned tensors are cast to it.
    """
    graph, wrap = lowering.graph, lowering.wrap
    for weight, sites in plan.by_weight().items():
        readers = uses(graph, tied.get(weight, [weight]))
        operator: Operator | None = None
        formed: fx.Proxy | None = None
        for node, user in readers:
            with lowering.serving(user, sites[0]):
                if operator is None:
                    # The weight may be read late in the graph but fetched first, so fetch it where it is used.
                    operator = transformed(
                        sites,
                        wrap(graph.get_attr(node.target)),
                        lambda site, leaf, dtype=dtypes[weight]: lowering.read(leaf, dtype),
                        lowering.training,
                        lowering.penalties,
                    )
                call = factored(user, node, sites[0].layout)
                if call is None and formed is None:
                    formed = sites[0].layout.restore(operator.dense())
                result = None if call is None else operator.apply(*(wrap(argument) for argument in call))
            if result is None:
                user.replace_input_with(node, formed.node)
            else:
                result.node.meta = {**user.meta, **result.node.meta}
                user.replace_all_uses_with(result.node)
                graph.erase_node(user)
    return graph
