"""Insert bottlenecks and the like on the attention and feed-forward sublayers of layers, inside the residual."""

from torch import Tensor, fx

from ...algebra import Computed
from ...errors import SubspanError
from ...graph.sublayers import sublayers
from ..base import Context
from ..lower import Compose, Lowering


def insert_sublayers(graph: fx.Graph, context: Context) -> fx.Graph:
    """Add phi(sublayer) to the residual in the place of every transformed sublayer."""
    lowering, located = Lowering(graph, context), []
    for site in context.plan.sites:
        if site.kind in ("attention", "feed_forward"):
            for call in sublayers(graph, site.place):
                found = next((one for one in call if one.kind == site.kind), None)
                if found is None:
                    raise SubspanError(f"{site.label}: this graph has no such sublayer")
                located.append((site, found))

    def applied(compose: Compose, output: Tensor, x: Tensor) -> list[Tensor]:
        return [compose(Computed(output)).apply(x)]

    for site, one in located:
        (result,) = lowering.site(one.add, site, [one.output, one.input], applied)
        one.add.replace_input_with(one.output, result)
    return graph
