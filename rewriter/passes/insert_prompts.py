"""Insert soft prompts: rows before the token embeddings; ids, masks and positions grow, outputs are cut back."""

import torch
from torch import fx

from ..algebra import Computed, Prepend
from ..plan import Plan, Site
from ..sublayers import embeddings, shape_of, token_ids
from .lowering import Lowering

aten = torch.ops.aten


def insert_prompts(lowering: Lowering, plan: Plan, dtype: torch.dtype) -> fx.Graph:
    """The graph with P before the token embeddings of every embeddings site of the plan.

    The inputs that run along the tokens get as many columns: the mask ones, positions their numbers (the sequence's are
    shifted), the ids one that is no padding, anything else zeros. So whatever the model derives from them follows.
    Outputs along the tokens lose the prompt's columns again: labels stay as they are.

    Args:
        lowering: of a traced graph, which is changed in place and returned.
        plan: the sites.
        dtype: storage type of the model.
    """
    for site in plan.sites:
        if site.kind == "embeddings":
            for node in embeddings(lowering.graph, site.place):
                _insert(lowering, site, node, dtype)
    return lowering.graph


def _insert(lowering: Lowering, site: Site, embedding: fx.Node, dtype: torch.dtype) -> None:
    graph, wrap = lowering.graph, lowering.wrap
    ids = token_ids(embedding)
    symbol, length = str(shape_of(ids)[1]), site.chain[0][1].length
    inputs = graph.find_nodes(op="placeholder")
    along = [node for node in inputs if len(shape_of(node)) == 2 and str(shape_of(node)[1]) == symbol]
    first = next(node for node in graph.nodes if node.op == "call_function")
    with lowering.serving(first, site):
        for node in along:
            before = torch.full_like(wrap(node)[:, :1], _value(graph, node, ids)).expand(-1, length)
            rest = wrap(node)
            if node.target == "position_ids":
                before, rest = before.cumsum(1) - 1, rest + length
            grown = torch.cat([before, rest], dim=1)
            node.replace_all_uses_with(grown.node, delete_user_cb=lambda user: "subspan" not in user.meta)
    with lowering.serving(embedding.next, site):
        tokens = wrap(embedding)[:, length:]
        phi = lowering.compose(site, Computed(tokens), dtype)
        assert isinstance(phi, Prepend)
        result = phi.apply(tokens)
    embedding.replace_all_uses_with(result.node, delete_user_cb=lambda user: user is not tokens.node)
    output = graph.output_node()
    with lowering.serving(output, site):
        cut = fx.map_arg(output.args, lambda node: _cut(wrap(node), node, symbol, length))
    output.args = cut


def _value(graph: fx.Graph, node: fx.Node, ids: fx.Node) -> int:
    """What the prompt's columns of an input hold."""
    if node is not ids:
        return int("mask" in str(node.target) or node.target == "position_ids")
    compared = (aten.eq.Scalar, aten.ne.Scalar)
    special = {user.args[1] for user in graph.nodes if user.target in compared}
    return next(i for i in range(len(special) + 1) if i not in special)


def _cut(output: fx.Proxy, node: fx.Node, symbol: str, length: int) -> fx.Node:
    size = shape_of(node)
    return output[:, length:].node if len(size) > 1 and str(size[1]) == symbol else node
