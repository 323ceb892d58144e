"""Lowering: a site's expression, traced on the graph's own fake tensors, becomes nodes of the graph.

Every node is an aten op with its shape (`meta["val"]`), part of the module of the op that it serves, marked with its
site. Expressions that are alike are traced once.
"""

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx

from ..algebra import Operator
from ..errors import SubspanError
from ..plan import Site
from ..transforms import Leaf
from .base import PREFIX, SITE, Context, described, value_of
from .clean.remove_dead import remove_dead

aten = torch.ops.aten
Compose = Callable[[Operator], Operator]


class Lowering:
    """Writes traced expressions into one graph.

    Attributes:
        last: the nodes of the latest expression, so that whoever replaces an input of theirs can leave them out.
    """

    def __init__(self, graph: fx.Graph, context: Context):
        self.graph, self.context = graph, context
        self.last: set[fx.Node] = set()
        example = next(node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), Tensor))
        self.fake, self.device = example.fake_mode, example.device

    def read(self, before: fx.Node, name: str, value: Tensor, label: str) -> fx.Node:
        """A node that reads a tensor of the module."""
        with self.graph.inserting_before(before):
            node = self.graph.create_node("get_attr", name)
        node.meta = {"nn_module_stack": before.meta.get("nn_module_stack", {}), SITE: label, "val": value}
        return node

    def leaves(self, before: fx.Node, sites: Sequence[Site], wide: torch.dtype) -> dict[str, fx.Node]:
        """Leaf name -> a node that reads it, of all sites.

        Args:
            wide: type of the tensors that are not of a type of their own.
        """
        found: dict[str, fx.Node] = {}
        for site in sites:
            for leaf in site.leaves:
                with self.fake:
                    value = leaf.empty(self.device, wide)
                found[leaf.name] = self.read(before, PREFIX + leaf.name, value, site.label)
        return found

    def site(
        self,
        before: fx.Node,
        site: Site,
        inputs: Sequence[fx.Node | None],
        build: Callable[..., list[Tensor]],
        key: Hashable = (),
    ) -> list[fx.Node]:
        """Nodes for `build(compose, *inputs)`, where `compose` is the site's chain, in the model's storage type.

        Args:
            before: the op that the expression serves, written before it.
            inputs: what `build` takes; None stays None.
            key: whatever else decides what `build` does.
        """
        dtype = self.context.dtype
        leaves = self.leaves(before, [site], torch.promote_types(dtype, torch.float32))

        def function(penalties: list, values: list[Tensor | None], tensors: list[Tensor]) -> tuple[list[Tensor], None]:
            lookup = looked_up([site], tensors, dtype)
            compose = lambda w: site.compose(w, lookup, self.training, penalties)  # noqa: E731
            return build(compose, *values), None

        names = (site_key(site), build.__qualname__, key, dtype)
        return self.splice(before, site.label, function, inputs, list(leaves.values()), names)[0]

    @property
    def training(self) -> bool:
        return self.context.mode == "train"

    def splice(
        self,
        before: fx.Node,
        label: str,
        function: Callable[[list, list[Tensor | None], list[Tensor]], tuple[list[Tensor], Any]],
        inputs: Sequence[fx.Node | None],
        leaves: Sequence[fx.Node],
        key: Hashable,
    ) -> tuple[list[fx.Node], Any]:
        """Trace `function(penalties, inputs, leaves)` and write its nodes before `before`.

        Args:
            function: returns tensors, and anything else; it fills `penalties` with (name, scalar).
            key: equal for functions that are alike; with the shapes of the inputs it decides what is traced anew.

        Returns:
            The nodes of the tensors, and what else the function returned when it was traced.
        """
        nodes = [*inputs, *leaves]
        shapes = tuple(None if node is None else described(node.meta["val"]) for node in nodes)
        known = self.context.lowered
        if (key, shapes) not in known:
            known[key, shapes] = _trace(function, len(inputs), [node and node.meta["val"] for node in nodes])
        traced, names, extra = known[key, shapes]
        there = [node for node in nodes if node is not None]
        meta = {"nn_module_stack": before.meta.get("nn_module_stack", {}), SITE: label}
        with self.graph.inserting_before(before):
            found = self._copy(traced, there, meta)
        count = len(found) - len(names)
        self.context.penalties += zip(names, found[count:], strict=True)
        return found[:count], extra

    def _copy(self, traced: fx.Graph, inputs: list[fx.Node], meta: dict[str, Any]) -> list[fx.Node]:
        at = dict(zip(traced.find_nodes(op="placeholder"), inputs, strict=True))
        self.last = set()
        for node in traced.nodes:
            if node.op != "call_function":
                continue
            if node.target is aten.dropout.default and not self.training:
                at[node] = at[node.args[0]]
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), at.__getitem__)
            at[node] = self.graph.call_function(node.target, args, kwargs)
            at[node].meta = {**meta, "val": node.meta["val"]}
            self.last.add(at[node])
        return [at[node] for node in traced.output_node().args[0]]


def _trace(function: Callable, count: int, values: list[Tensor | None]) -> tuple[fx.Graph, list[str], Any]:
    """The graph of a function on fake tensors, the names of its penalties, and what else it returns."""
    names: list[str] = []
    extra: list[Any] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        whole = iter(tensors)
        filled = [None if value is None else next(whole) for value in values]
        penalties: list[tuple[str, Tensor]] = []
        found, more = function(penalties, filled[:count], filled[count:])
        names[:], extra[:] = [name for name, _ in penalties], [more]
        return [*found, *(value for _, value in penalties)]

    # New objects, since two nodes may share one fake tensor and would be traced as one.
    inputs = [value.detach() for value in values if value is not None]
    guards = inputs[0].fake_mode.shape_env.guards
    before = len(guards)
    module = make_fx(flat, pre_dispatch=True)(*inputs)
    if guards[before:]:
        raise SubspanError(f"an expression holds for some sizes of a batch alone: {guards[before].expr}")
    graph = remove_dead(module.graph)
    for node in graph.nodes:
        if node.op == "get_attr":
            raise SubspanError("an expression makes a tensor out of numbers (torch.tensor); declare it by site.frozen")
        plain = node.target is operator.getitem or isinstance(node.target, torch._ops.OpOverload)
        if plain and getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            raise SubspanError(f"an expression changes a tensor in place: {node.target}")
        if node.op == "call_function" and not plain:
            raise SubspanError(f"an expression is no chain of tensor ops: it calls {node.name} ({node.target})")
    return graph, names, extra[0]


def looked_up(sites: Sequence[Site], tensors: list[Tensor], dtype: torch.dtype) -> Callable[[Leaf], Tensor]:
    """leaf -> its value, of the sites' leaves in order; wider ones are cast to a half type where the weight is one."""
    names = list(dict.fromkeys(leaf.name for site in sites for leaf in site.leaves))
    found = dict(zip(names, tensors, strict=True))
    exact = dtype in (torch.float32, torch.float64)

    def lookup(leaf: Leaf) -> Tensor:
        value = found[leaf.name]
        return value if exact or not value.is_floating_point() else value.to(dtype)

    return lookup


def site_key(site: Site) -> Hashable:
    """Equal for sites whose expressions are the same but for the names of their leaves."""
    chain = tuple((one.function, options.model_dump_json()) for one, options in site.chain)
    given = tuple((name.rpartition(".")[2], tuple(sizes.items())) for name, sizes in site.given.items())
    return site.kind, site.block, site.shape, site.layout, chain, given


def refresh(graph: fx.Graph, context: Context, last: fx.Node | None = None) -> fx.Graph:
    """The graph with every shape computed anew, from its inputs and the tensors it reads, as far as a node."""
    fake = next(node.meta["val"] for node in graph.find_nodes(op="placeholder")).fake_mode
    # What is decided on the way by the examples' sizes must not become a fact about the symbols.
    with fake, fake.shape_env.suppress_guards(), enable_python_dispatcher():
        for node in graph.nodes:
            if node.op == "call_function" and "val" in node.meta:
                node.meta["val"] = value_of(node, context)
            if node is last:
                break
    return graph
