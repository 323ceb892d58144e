"""What every pass is: its signature, and what it may know beside the graph."""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ..plan import Plan

# Key of an output node's meta: names of the penalties that follow the module's own outputs.
PENALTIES = "penalties"
# Key of a node's meta: the label of the site that the node was inserted for.
SITE = "subspan"
# Of the names of inserted tensors.
PREFIX = "subspan."

Stage = Literal["trace", "rewrite", "train", "export"]
Numerics = Literal["inserting", "preserving", "changing"]


@dataclass
class Context:
    """What a pass may know beside the graph.

    Attributes:
        mode: name of the graph, `train` or `eval`.
        plan: the sites; None before there is a plan.
        tied: first name -> all names of a tied weight.
        dtypes: parameter name -> storage type; wider tuned tensors are cast to it.
        penalties: what inserted expressions add to the loss: (name, scalar node).
        defers: whether the loss takes logits that are not computed yet.
        device: kind of device that the graph runs on.
        longest: the most tokens of a row of a step, padded on the right; None where they are padded otherwise.
        lean: whether a step keeps less for its backward at the price of time.
        tensors: the model's tensors by name, where what is computed of frozen ones may be computed now.
        folded: name -> what was computed so, for the model to hold.
        lowered: expressions that were traced already, and shapes of ops; may be kept from rewrite to rewrite.
    """

    mode: str
    plan: Plan | None = None
    tied: Mapping[str, list[str]] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    penalties: list[tuple[str, fx.Node]] = field(default_factory=list)
    defers: bool = False
    device: str = "cpu"
    longest: int | None = None
    lean: bool = False
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)
    lowered: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of the model: of its first parameter."""
        return next(iter(self.dtypes.values()))


@dataclass(frozen=True)
class Pass:
    """A pass in the list.

    Attributes:
        function: (graph, context) -> graph; it may change the graph in place.
        stages: when it runs: after a trace, in a rewrite, before training, before an export.
        numerics: "inserting" puts in what the plan says and can't be left out; "preserving" leaves outputs and
            gradients as they are, up to rounding; "changing" does not, and runs only where it is asked for.
    """

    function: Callable[[fx.Graph, Context], fx.Graph]
    stages: tuple[Stage, ...]
    numerics: Numerics = "preserving"

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def doc(self) -> str:
        """Its docstring's first line."""
        return (self.function.__doc__ or "").strip().splitlines()[0].rstrip(".")


def inserted(node: fx.Node) -> bool:
    """Whether a node was inserted for a site."""
    return SITE in node.meta


def changing(context: Context) -> set[str]:
    """The names in the module of the tensors that tuning changes: tuned leaves, and what schedules choose."""
    sites = context.plan.sites if context.plan else ()
    return {PREFIX + leaf.name for site in sites for leaf in site.leaves if leaf.role != "constant"}


def comes_from(node: fx.Node, names: Collection[str]) -> bool:
    """Whether a node is computed from a tensor of the module of one of the names."""
    stack, seen = [node], {node}
    while stack:
        one = stack.pop()
        if one.op == "get_attr" and one.target in names:
            return True
        new = [source for source in one.all_input_nodes if source not in seen]
        seen.update(new)
        stack += new
    return False


def is_row(scale: Any, x: fx.Node) -> bool:
    """Whether a node is one number for each column of another one, in its type."""
    if not isinstance(scale, fx.Node) or not isinstance(value := scale.meta["val"], Tensor):
        return False
    width = x.meta["val"].shape[-1]
    return tuple(value.shape) in ((width,), (1, width)) and value.dtype == x.meta["val"].dtype


def described(value: Any) -> Hashable:
    """Equal for fake tensors of one type and of shapes that are equal as expressions; other values by their text."""
    return (tuple(map(str, value.shape)), value.dtype) if isinstance(value, torch.Tensor) else str(value)


def add_node(graph: fx.Graph, context: Context, like: fx.Node, target: Callable, *args: Any, **kwargs: Any) -> fx.Node:
    """A call of an op at the insertion point, with its shape, as part of the module and the site of another node."""
    node = graph.call_function(target, args, kwargs)
    node.meta = {key: like.meta[key] for key in ("nn_module_stack", SITE) if key in like.meta}
    node.meta["val"] = value_of(node, context)
    return node


def value_of(node: fx.Node, context: Context) -> Any:
    """What a call gives on the fake tensors of its inputs; computed once for inputs of equal shapes."""
    call = node.args, node.kwargs
    key = (node.target, str(fx.map_arg(call, lambda one: described(one.meta["val"]))))
    if key not in context.lowered:
        args, kwargs = fx.map_arg(call, lambda one: one.meta["val"])
        if node.target is torch.ops.aten.matmul.default and args[1].ndim == 2:
            # torch 2.11 can't fold the product of symbolic sizes outside of a trace.
            context.lowered[key] = args[0].new_empty((*args[0].shape[:-1], args[1].shape[-1]))
        else:
            context.lowered[key] = node.target(*args, **kwargs)
    return context.lowered[key]


def function_of(region: Sequence[fx.Node], sources: Sequence[fx.Node]) -> Callable:
    """The last node of a region, or the first source where that is empty, as a function of what the region reads.

    It is no module: hooks on modules would count its call in a backward.
    """
    graph = fx.Graph()
    at = {source: graph.placeholder(f"source_{i}") for i, source in enumerate(sources)}
    for node in region:
        at[node] = graph.node_copy(node, at.__getitem__)
    graph.output(at[region[-1] if region else sources[0]])
    return fx.GraphModule(nn.Module(), graph).forward
