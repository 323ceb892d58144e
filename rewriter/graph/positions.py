"""How positions enter: by what they do to the keys of attention, or by tables that are looked up by them."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from ..errors import SubspanError
from .ops import ADDS, PASSING, SCALINGS, VIEWS, aten
from .sublayers import Attention, attentions, embeddings, nearest_linear, shape_of
from .traced import TracedModel

_COUNTS = (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.cumsum.default)
_MOVES = {*ADDS, *SCALINGS, *VIEWS, *PASSING, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar}
# Types of rotation whose angles are linear in the position at any length.
_LINEAR = {"default", "linear", "llama3", "yarn"}
_CLOSE = 1e-4  # float32's rounding of cosines


def tables(graph: fx.Graph) -> list[fx.Node]:
    """The embedding ops that read positions: numbers that are counted, or an input of that name."""
    found, of_tokens = graph.find_nodes(op="call_function", target=aten.embedding.default), embeddings(graph)
    return [node for node in found if node not in of_tokens and _counted(node.args[1])]


def _counted(index: fx.Node) -> bool:
    """Whether an index is a count, or an input of positions, moved or cut at most: no distance between two of them."""
    queue, seen = [index], set()
    while queue:
        node = queue.pop()
        if node in seen or not isinstance(node.meta.get("val"), Tensor):
            continue
        if node.target in (*_COUNTS, "position_ids"):
            return True
        seen.add(node)
        if node.target in _MOVES:
            queue += node.all_input_nodes
    return False


def by_table(model: TracedModel) -> bool:
    """Whether a decoder's positions enter by a table, not by rotated queries and keys.

    Raises:
        SubspanError: they enter otherwise, or it attends within a window, in which rows that move the positions count.
    """
    text = _text(model.config)
    local = {*(getattr(text, "layer_types", None) or ()), *(getattr(text, "attention_layers", None) or ())}
    window = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    if window or local - {"full_attention", "global"}:
        raise SubspanError("its attention has a window, in which rows that move the positions count")
    rotates = bool(getattr(text, "rope_parameters", None))
    if not hasattr(text, "use_cache") or rotates == bool(tables(next(iter(model.graphs.values())))):
        raise SubspanError("its positions are neither those of a table nor those of rotated queries and keys alone")
    return not rotates


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def turn_of(model: TracedModel, module: str, length: int) -> Tensor:
    """R (head width, head width), float64, on the CPU: a key k (a row) of a module's self-attention is k R where it
    stands `length` positions on. RoPE, arXiv 2104.09864

    Raises:
        SubspanError: positions enter in another way than by rotated queries and keys.
    """
    check_angles(model.config)
    graph = next(iter(model.graphs.values()))
    return _turn(model, graph, next(one for one in attentions(graph, module) if not one.cross), length)


def check_angles(config: Any) -> None:
    """Refuse a rotation whose angles depend on more than the position.

    Raises:
        SubspanError: with its type.
    """
    rope = getattr(_text(config), "rope_parameters", None) or {}
    each = [one for one in rope.values() if isinstance(one, Mapping)] or [rope]
    if others := {one.get("rope_type", "default") for one in each} - _LINEAR:
        raise SubspanError(f"its rotation ({', '.join(sorted(map(str, others)))}) depends on the length")


def _turn(model: TracedModel, graph: fx.Graph, one: Attention, length: int) -> Tensor:
    if one.product is not None or _made_of_values(one.arguments["attn_mask"]):
        raise SubspanError(f"{one.module}: where positions meet the keys is not known")
    keys, query = (_rotation(model, graph, one.module, node, length) for node in (one.keys, one.query))
    if (keys - query).abs().max() > _CLOSE:
        raise SubspanError(f"{one.module}: positions do not rotate queries as keys")
    return keys


def _made_of_values(mask: fx.Node | None) -> bool:
    return isinstance(mask, fx.Node) and nearest_linear(mask) is not None


def _rotation(model: TracedModel, graph: fx.Graph, module: str, end: fx.Node, length: int) -> Tensor:
    """R of queries or keys.

    Raises:
        SubspanError: positions do something else to them.
    """
    source, width = nearest_linear(end), shape_of(end)[-1]
    if source is None:
        raise SubspanError(f"{module}: where positions meet the keys is not known")
    steps = length + 2
    size, device = shape_of(source)[-1], next(model.parameters()).device
    unit = torch.eye(width, dtype=torch.float64, device=device).repeat(1, -(-size // width))[:, :size]
    unit = unit.unsqueeze(1).expand(-1, steps, -1)
    found = _run(model, graph, end, {source: unit if len(shape_of(source)) == 3 else unit.flatten(0, 1)}, steps)
    at = found.double().cpu().permute(1, 2, 0, 3)  # (heads, positions, unit vector, head width)
    try:
        found = torch.linalg.solve(at[:, :1], at[:, [1, length, length + 1]])
    except RuntimeError:
        raise SubspanError(f"{module}: positions do not rotate its keys") from None
    turn = found[0, 1]
    same = (found - found[:1]).abs().max() < _CLOSE and (found[0, 0] @ turn - found[0, 2]).abs().max() < _CLOSE
    rotation = (turn @ turn.mT - torch.eye(width)).abs().max() < _CLOSE
    if not (same and rotation) or (turn - torch.eye(width)).abs().max() < _CLOSE:
        raise SubspanError(f"{module}: positions do not rotate its keys")
    return turn


def _wide(value: Any) -> Any:
    """Half types as float32: what they round is no part of what is looked for."""
    return torch.float32 if value is torch.float16 or value is torch.bfloat16 else value


def _run(model: TracedModel, graph: fx.Graph, end: fx.Node, given: dict[fx.Node, Tensor], steps: int) -> Tensor:
    """The value of a node for given values of others, on ones in the place of inputs."""
    above, queue = set(), [end]
    while queue:
        node = queue.pop()
        if node not in above:
            above.add(node)
            queue += [] if node in given else node.all_input_nodes
    first = next(iter(given.values()))
    batch = len(first) if first.ndim == 3 else len(first) // steps
    ranges = {(one.place, one.dimension) for one in next(iter(model.signatures.values())).ranges}
    values, place = dict(given), -1
    with torch.no_grad():
        for node in graph.nodes:
            place += node.op == "placeholder"
            if node not in above or node in given:
                continue
            if node.op == "placeholder":
                shape = [
                    (batch, steps)[dim] if (place, dim) in ranges and dim < 2 else int(size)
                    for dim, size in enumerate(shape_of(node))
                ]
                values[node] = torch.ones(shape, dtype=node.meta["val"].dtype, device=first.device)
            elif node.op == "get_attr":
                values[node] = attrgetter(node.target)(model)
            else:
                args, kwargs = pytree.tree_map(_wide, fx.map_arg((node.args, node.kwargs), values.get))
                values[node] = node.target(*args, **kwargs)
    return values[end]
