"""Causal: attention to a token and what is before it, and to nothing else, needs no mask."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ...graph.ops import SDPA
from ...graph.sublayers import attentions, shape_of
from ..base import Context
from ..clean.remove_dead import remove_dead

_READS = {"input_ids", "attention_mask"}
_SHORT, _LONG = 5, 8192  # Of longer rows a mask takes too much memory to be looked at.


def causal(graph: fx.Graph, context: Context) -> fx.Graph:
    """Let attention leave out what comes later by itself, where a mask does no more to tokens that are real.

    Rows are padded on the right in steps: padding comes later than every real token, and nothing is learnt there. What
    a mask does is not read off its construction but seen: it is made for short rows, padded and not, and for one as
    long as the data's.
    """
    places = {node.target: node for node in graph.nodes if node.op == "placeholder"}
    if context.longest is None or context.longest > _LONG or set(places) != _READS:
        return graph
    seen: dict[fx.Node, bool] = {}
    for node, given in ((one.node, one.arguments) for one in attentions(graph) if one.node.target is SDPA):
        mask, lengths = given["attn_mask"], [str(shape_of(given[name])[-2]) for name in ("query", "key")]
        if not isinstance(mask, fx.Node) or given["is_causal"] or lengths[0] != lengths[1]:
            continue
        if mask not in seen:
            seen[mask] = all(_is_causal(mask, places, length) for length in (_SHORT, context.longest))
        if seen[mask]:
            node.args = tuple(given.pop(name) for name in ("query", "key", "value"))
            node.kwargs = given | {"attn_mask": None, "is_causal": True}
    return remove_dead(graph)


def _is_causal(mask: fx.Node, places: Mapping[str, fx.Node], length: int) -> bool:
    """Whether a mask of rows that are padded on the right lets each real token see itself and those before it alone."""
    real = torch.ones(3 if length == _SHORT else 1, length, dtype=torch.long)
    for row in range(1, len(real)):
        real[row, row:] = 0
    known = {places["input_ids"]: torch.zeros_like(real), places["attention_mask"]: real}
    made = _value(mask, known)
    if not isinstance(made, torch.Tensor) or made.ndim != 4 or made.shape[-2:] != (length, length):
        return False
    seen, hidden = (made, ~made) if made.dtype == torch.bool else (made == 0, made <= torch.finfo(made.dtype).min / 2)
    before = torch.ones(length, length, dtype=torch.bool).tril()
    return bool((torch.where(before, seen, hidden) | (real == 0)[:, None, :, None]).all())


def _value(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """What a node gives; None where that depends on more than what is known."""
    if node not in known:
        made = [_value(one, known) for one in node.all_input_nodes]
        if node.op != "call_function" or any(one is None for one in made):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        known[node] = node.target(*args, **kwargs)
    return known[node]
