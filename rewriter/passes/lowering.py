"""Lowering: a site's expression, evaluated on proxies, becomes nodes of a graph."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import fx

from ..algebra import Operator, Value
from ..plan import Site
from ..transforms import Leaf

PREFIX = "subspan."


class Lowering(fx.proxy.GraphAppendingTracer):
    """Writes nodes that belong to the module of the op they serve, and to a site; collects the penalties."""

    def __init__(self, graph: fx.Graph, training: bool):
        super().__init__(graph)
        self.training = training
        self.penalties: list[tuple[str, Value]] = []
        self.meta: dict[str, object] = {}

    def create_node(self, *args, **kwargs):
        node = super().create_node(*args, **kwargs)
        node.meta.update(self.meta)
        return node

    def wrap(self, value: object) -> object:
        """A node as a proxy; anything else as it is."""
        return fx.Proxy(value, self) if isinstance(value, fx.Node) else value

    def call(self, target: Callable, *args: object, **kwargs: object) -> fx.Proxy:
        """A call of an op on nodes and constants, e.g. one that the model makes too."""
        return fx.Proxy(self.create_node("call_function", target, args, kwargs), self)

    @contextlib.contextmanager
    def serving(self, consumer: fx.Node, site: Site) -> Iterator[None]:
        """Write before `consumer`, as a part of its module."""
        self.meta = {"nn_module_stack": consumer.meta.get("nn_module_stack", {}), "subspan": site.label}
        with self.graph.inserting_before(consumer):
            yield

    def read(self, leaf: Leaf, dtype: torch.dtype) -> fx.Proxy:
        """The tensor of a leaf; wider tuned tensors are cast to `dtype`."""
        value = fx.Proxy(self.create_node("get_attr", PREFIX + leaf.name, (), {}), self)
        exact = leaf.role == "chosen" or dtype in (torch.float32, torch.float64)
        return value if exact else value.to(dtype)

    def compose(self, site: Site, w: Operator, dtype: torch.dtype) -> Operator:
        """The site's chain on an operator."""
        return site.compose(w, lambda leaf: self.read(leaf, dtype), self.training, self.penalties)
