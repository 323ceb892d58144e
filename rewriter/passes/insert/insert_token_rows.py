"""Insert rows before the token embeddings; ids, masks and positions grow, outputs are cut back."""

import torch
from torch import Tensor, fx

from ...algebra import Computed
from ...graph.ops import aten
from ...graph.sublayers import embeddings, shape_of, token_ids
from ...plan import Site
from ..base import Context
from ..lower import Compose, Lowering, refresh


def insert_token_rows(graph: fx.Graph, context: Context) -> fx.Graph:
    """Put rows before the token embeddings of every transformed place.

    The inputs that run along the tokens get as many columns: the mask ones, positions their numbers (the sequence's are
    shifted), the ids one that is no padding, anything else zeros. So whatever the model derives from them follows.
    Outputs along the tokens lose these columns again: labels stay as they are.
    """
    for site in context.plan.sites:
        if site.kind == "embeddings":
            for node in embeddings(graph, site.place):
                _insert(Lowering(graph, context), site, node)
    return graph


def _insert(lowering: Lowering, site: Site, embedding: fx.Node) -> None:
    graph, length = lowering.graph, site.rows
    ids = token_ids(embedding)
    symbol = str(shape_of(ids)[1])
    inputs, output = graph.find_nodes(op="placeholder"), graph.output_node()
    cut_back = {node for node in output.all_input_nodes if len(shape_of(node)) > 1 and str(shape_of(node)[1]) == symbol}
    first = next(node for node in graph.nodes if node.op == "call_function")
    for node in inputs:
        if len(shape_of(node)) == 2 and str(shape_of(node)[1]) == symbol:
            value, shifted = _value(graph, node, ids), node.target == "position_ids"

            def grown(compose: Compose, rest: Tensor, value=value, shifted=shifted) -> list[Tensor]:
                before = torch.full_like(rest[:, :1], value).expand(-1, length)
                if shifted:
                    before, rest = before.cumsum(1) - 1, rest + length
                return [torch.cat([before, rest], dim=1)]

            (whole,) = lowering.site(first, site, [node], grown, (value, shifted))
            mine = lowering.last
            node.replace_all_uses_with(whole, delete_user_cb=lambda user, mine=mine: user not in mine)

    refresh(graph, lowering.context, embedding)

    def prepended(compose: Compose, whole: Tensor) -> list[Tensor]:
        tokens = whole[:, length:]
        return [compose(Computed(tokens)).apply(tokens)]

    (result,) = lowering.site(embedding.next, site, [embedding], prepended)
    mine = lowering.last
    embedding.replace_all_uses_with(result, delete_user_cb=lambda user: user not in mine)

    def cut(compose: Compose, whole: Tensor) -> list[Tensor]:
        return [whole[:, length:]]

    refresh(graph, lowering.context)
    replace = lambda node: lowering.site(output, site, [node], cut)[0] if node in cut_back else node  # noqa: E731
    output.args = fx.map_arg(output.args, replace)


def _value(graph: fx.Graph, node: fx.Node, ids: fx.Node) -> int:
    """What the new columns of an input hold."""
    if node is not ids:
        return int("mask" in str(node.target) or node.target == "position_ids")
    compared = (aten.eq.Scalar, aten.ne.Scalar)
    special = {user.args[1] for user in graph.nodes if user.target in compared}
    return next(i for i in range(len(special) + 1) if i not in special)
