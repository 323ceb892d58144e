"""Hand the penalties of the sites out of the train graph, after its own outputs."""

import operator
from functools import reduce

from torch import fx

from ..trace import NAMES
from .lowering import Lowering


def add_penalties(lowering: Lowering) -> fx.Graph:
    """The graph with one more output for each kind of penalty, summed over the sites.

    Their names are in the output node's meta, under `trace.NAMES`.
    """
    groups: dict[str, list[fx.Proxy]] = {}
    for name, value in lowering.penalties:
        groups.setdefault(name, []).append(value)
    output = lowering.graph.output_node()
    with lowering.graph.inserting_before(output):
        sums = [reduce(operator.add, values).node for values in groups.values()]
    output.args = ((*output.args[0], *sums),)
    output.meta[NAMES] = list(groups)
    return lowering.graph
