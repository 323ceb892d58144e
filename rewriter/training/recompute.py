"""Recompute: a layer keeps its inputs alone for the backward, which computes the rest again."""

import re
from bisect import bisect_left
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from ..errors import SpecError
from ..tuned import TunedModel

PATH = ("train", "gradient_checkpointing")


def by_layer(model: TunedModel, layers: int | None = None) -> None:
    """Let the train graph of a model recompute its layers in the backward. In place.

    Args:
        layers: how many, from the first on, whose turn in the backward comes when what others saved is gone; None: all.

    Raises:
        SpecError: the graph has no layers, or they are not one after the other.
    """
    model.graphs["train"] = recomputed(model.graphs["train"], layers)
    model.recompile()


def fewest(model: TunedModel, fits: Callable[[TunedModel], bool]) -> int:
    """How many layers have to be recomputed, from the first on, until a model fits; all where even
    they are too few.

    Args:
        model: its train graph recomputes nothing.
        fits: of the model with some of its layers recomputed; it goes on to fit with more of them.

    Raises:
        SpecError: as `by_layer`.
    """

    def with_layers(count: int) -> bool:
        one = model.clone("train").train()
        by_layer(one, count)
        return fits(one)

    if fits(model):
        return 0
    most = len(_spans(list(model.graphs["train"].nodes)))
    return 1 + bisect_left(range(1, most), True, key=with_layers)


def recomputed(graph: fx.Graph, layers: int | None = None) -> fx.Graph:
    """A graph with a call of `torch.utils.checkpoint` in the place of the nodes of each layer.

    A layer is what lies from the first to the last node of a module whose path is one by `layer_of`.

    Args:
        layers: how many, from the first on; None: all.

    Raises:
        SpecError: there is none, or they are not one after the other.
    """
    nodes = list(graph.nodes)
    spans = dict(list(_spans(nodes).items())[:layers])
    inside = {nodes[i]: layer for layer, (first, last) in spans.items() for i in range(first, last + 1)}
    out, made = fx.Graph(), {}
    for node in (
        *(n for n in nodes if n.op in ("placeholder", "get_attr")),
        *(n for n in nodes if n.op == "call_function"),
    ):
        if node in made:
            continue
        layer = inside.get(node) if node.op == "call_function" else None
        if layer is None:
            made[node] = out.node_copy(node, made.__getitem__)
        else:
            first, last = spans[layer]
            _call(out, made, [n for n in nodes[first : last + 1] if n.op == "call_function"])
    output = graph.output_node()
    out.output(fx.map_arg(output.args[0], made.__getitem__)).meta = dict(output.meta)
    return out


def _spans(nodes: list[fx.Node]) -> dict[str, list[int]]:
    """Layer -> the places of its first and its last node, in the order of the graph."""
    spans: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        if node.op == "call_function" and (layer := _layer(node)):
            spans.setdefault(layer, [i, i])[1] = i
    if not spans:
        raise SpecError("the model has no layers to compute again", PATH)
    ordered = sorted(spans.items(), key=lambda item: item[1])
    for (one, (_, end)), (other, (start, _)) in pairwise(ordered):
        if start < end:
            raise SpecError(f"{one} and {other} are not one after the other in the graph", PATH)
    return dict(ordered)


def layer_of(path: str) -> str | None:
    """The layer that a module or a parameter is of: its path up to the first number, e.g. `encoder.layer.3`."""
    found = re.match(r".*?(?:^|\.)\d+(?=\.|$)", path)
    return found and found[0]


def _layer(node: fx.Node) -> str | None:
    """The layer that a node is of, by the paths of the modules it was traced in, the outermost first."""
    paths = (path for path, _ in (node.meta.get("nn_module_stack") or {}).values())
    return next(filter(None, map(layer_of, paths)), None)


def _call(out: fx.Graph, made: dict[fx.Node, fx.Node], nodes: list[fx.Node]) -> None:
    """Put a call of the nodes' function into a graph, and what others read of it."""
    own = set(nodes)
    read = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in own)
    left = [node for node in nodes if any(user not in own for user in node.users)]
    part, copies = fx.Graph(), {}
    for source in read:
        copies[source] = part.placeholder(source.name)
    for node in nodes:
        copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in left))
    part.lint()
    forward = type(fx.GraphModule(torch.nn.Module(), part)).forward
    call = out.call_function(_recomputing(forward), tuple(made[source] for source in read))
    for i, node in enumerate(left):
        made[node] = out.call_function(_item, (call, i))
        made[node].meta = dict(node.meta)
    for node in nodes:
        made.setdefault(node, call)  # Nobody else reads it.


def _recomputing(forward: Callable[..., tuple]) -> Callable[..., Any]:
    """The function of a part, called under `torch.utils.checkpoint`."""
    nothing = torch.nn.Module()

    def recomputed_layer(*args: Any) -> tuple:
        return checkpoint(forward, nothing, *args, use_reentrant=False)

    return recomputed_layer


def _item(values: tuple, index: int) -> Any:
    return values[index]
