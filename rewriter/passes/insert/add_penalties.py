"""Hand the penalties of the sites out of the train graph, after its own outputs."""

from functools import reduce

from torch import fx

from ...graph.ops import aten
from ..base import PENALTIES, Context, add_node


def add_penalties(graph: fx.Graph, context: Context) -> fx.Graph:
    """Hand out each kind of penalty as one more output of the train graph, summed over the sites.

    Their names are in the output node's meta, under `PENALTIES`.
    """
    if context.mode != "train":
        return graph
    groups: dict[str, list[fx.Node]] = {}
    for name, node in context.penalties:
        groups.setdefault(name, []).append(node)
    output = graph.output_node()
    with graph.inserting_before(output):
        sums = [
            reduce(lambda a, b: add_node(graph, context, b, aten.add.Tensor, a, b), nodes) for nodes in groups.values()
        ]
    output.args = ((*output.args[0], *sums),)
    output.meta[PENALTIES] = list(groups)
    return graph
