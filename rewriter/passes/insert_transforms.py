"""Insert phi(W) at every consumer of a transformed weight: factored at linear ops, formed before any other op."""

from collections.abc import Callable

import torch
from torch import fx

from ..algebra import Operator
from ..plan import Plan, Site, transformed, uses
from ..transforms import Leaf

aten = torch.ops.aten
PREFIX = "subspan."


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Writes nodes that belong to the module of the op they serve, and to a site."""

    def serve(self, consumer: fx.Node, site: Site) -> None:
        self.meta = {"nn_module_stack": consumer.meta.get("nn_module_stack", {}), "subspan": site.label}

    def create_node(self, *args, **kwargs):
        node = super().create_node(*args, **kwargs)
        node.meta.update(self.meta)
        return node


def insert_transforms(
    graph: fx.Graph, plan: Plan, tied: dict[str, list[str]], dtypes: dict[str, torch.dtype]
) -> fx.Graph:
    """The graph with every site of the plan transformed; the tensors are read from `subspan.<leaf>`.

    Args:
        graph: a traced graph; changed in place and returned.
        plan: the sites.
        tied: first name -> all names of a tied weight.
        dtypes: parameter name -> storage type; wider tuned tensors are cast to it.
    """
    tracer = _Tracer(graph)
    wrap = lambda n: fx.Proxy(n, tracer) if isinstance(n, fx.Node) else n  # noqa: E731
    for weight, sites in plan.by_weight().items():
        readers = uses(graph, tied.get(weight, [weight]))
        if not readers:
            continue
        operator: Operator | None = None
        formed: fx.Proxy | None = None
        for node, user in readers:
            tracer.serve(user, sites[0])
            with graph.inserting_before(user):
                if operator is None:
                    # The weight may be read late in the graph but fetched first, so fetch it where it is used.
                    stored = wrap(graph.get_attr(node.target))
                    operator = transformed(sites, stored, _reader(tracer, dtypes[weight]))
                call = _factored(user, node, sites[0])
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


def _reader(tracer: _Tracer, dtype: torch.dtype) -> Callable[[Site, Leaf], fx.Proxy]:
    def lookup(site: Site, leaf: Leaf) -> fx.Proxy:
        value = fx.Proxy(tracer.create_node("get_attr", PREFIX + leaf.name, (), {}), tracer)
        return value if dtype in (torch.float32, torch.float64) else value.to(dtype)

    return lookup


def _factored(user: fx.Node, weight: fx.Node, site: Site) -> tuple[fx.Node, fx.Node | None] | None:
    """(x, bias) where the op is x @ W (+ bias) in the site's layout; None where phi(W) has to be formed."""
    args, transposed = user.args, site.layout.transposed
    if len(site.layout.stored) != 2:
        return None
    if user.target is aten.linear.default and args[1] is weight and args[0] is not weight and transposed:
        return args[0], args[2] if len(args) > 2 else None
    if user.target is aten.addmm.default and args[2] is weight and args[1] is not weight and not transposed:
        return None if user.kwargs else (args[1], args[0])
    if user.target in (aten.mm.default, aten.matmul.default) and args[1] is weight and args[0] is not weight:
        return None if transposed else (args[0], None)
    return None
