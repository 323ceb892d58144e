"""Insert rows before the keys and the values of attention, with the mask grown by as much."""

import torch
from torch import Tensor, fx

from ...algebra import Computed, rows_of
from ...graph.ops import aten
from ...graph.positions import tables
from ...graph.sublayers import Attention, attentions, shape_of
from ...plan import Site
from ..base import Context, inserted
from ..lower import Compose, Lowering


def insert_attention_rows(graph: fx.Graph, context: Context) -> fx.Graph:
    """Let every transformed attention attend to rows of its own, which no mask hides.

    Causal masks stay causal for the sequence; key heads shared by groups of query heads share their rows too. Where
    rows take positions, tables of these are read as many further on.
    """
    sites: dict[str, dict[str, Site]] = {}
    for site in context.plan.sites:
        if site.kind in ("keys", "values"):
            sites.setdefault(site.place, {})[site.kind] = site
    lowering = Lowering(graph, context)
    for one in [one for one in attentions(graph) if one.module in sites]:
        insert = _insert_sdpa if one.product is None else _insert_explicit
        insert(lowering, one, sites[one.module])
    moving = [site for pair in sites.values() for site in pair.values() if site.moves]
    for node in tables(graph) if moving else ():
        _move(lowering, node, moving[0])
    return graph


def _move(lowering: Lowering, lookup: fx.Node, site: Site) -> None:
    count = site.moves
    (moved,) = lowering.site(lookup, site, [lookup.args[1]], lambda compose, index: [index + count], count)
    lookup.args = (lookup.args[0], moved, *lookup.args[2:])


def _rows(compose: Compose, one: Attention, example: Tensor) -> Tensor:
    """P, shape (heads, length, head width), repeated as the op's heads are."""
    rows = rows_of(compose(Computed(example)))
    rows = rows.unflatten(-1, (one.heads, -1)).transpose(0, 1)
    return rows if one.repeats == 1 else rows.repeat_interleave(one.repeats, 0)


def _insert_sdpa(lowering: Lowering, one: Attention, pair: dict[str, Site]) -> None:
    node, arguments, length = one.node, one.arguments, pair["keys"].rows
    key = (one.heads, one.repeats)

    def grown(compose: Compose, value: Tensor) -> list[Tensor]:
        rows = _rows(compose, one, value)
        return [torch.cat([rows.expand(*value.shape[:-2], -1, -1), value], dim=-2)]

    def mask(compose: Compose, query: Tensor, keys: Tensor, given: Tensor | None) -> list[Tensor]:
        if given is None:
            size = query.size(-2)
            given = query.new_ones((size, keys.size(-2)), dtype=torch.bool).tril()
            return [torch.cat([query.new_ones((size, length), dtype=torch.bool), given], dim=-1)]
        column = given[..., :1]
        open_ = torch.ones_like(column) if given.dtype == torch.bool else torch.zeros_like(column)
        return [torch.cat([open_.expand(*[-1] * (given.ndim - 1), length), given], dim=-1)]

    query, keys, values, given = (arguments[name] for name in ("query", "key", "value", "attn_mask"))
    (new_keys,) = lowering.site(node, pair["keys"], [keys], grown, key)
    (new_values,) = lowering.site(node, pair["values"], [values], grown, key)
    new_mask = None
    if given is not None or arguments["is_causal"]:
        (new_mask,) = lowering.site(node, pair["keys"], [query, keys, given], mask)
    node.args = (query, new_keys, new_values, new_mask, arguments["dropout_p"], False)
    node.kwargs = {name: value for name, value in arguments.items() if name in ("scale", "enable_gqa")}


def _insert_explicit(lowering: Lowering, one: Attention, pair: dict[str, Site]) -> None:
    """The rows have scores of their own in the softmax, and add their part to the product with the values.

    So whatever the model adds to the scores of the sequence, by position, stays as it is.
    """
    softmax, product, length = one.node, one.product, pair["keys"].rows
    flat = len(shape_of(one.query)) == 3
    scalars = [argument for _, more in one.scalings for argument in more if isinstance(argument, fx.Node)]
    key = (one.heads, one.repeats, flat, tuple((op, str(more)) for op, more in one.scalings))

    def probabilities(compose: Compose, query: Tensor, scores: Tensor, *values: Tensor) -> list[Tensor]:
        at = dict(zip(scalars, values, strict=True))
        query = query.unflatten(0, (-1, one.heads * one.repeats)) if flat else query
        own = query @ _rows(compose, one, query).to(query.dtype).transpose(-2, -1)
        for op, more in one.scalings:
            own = op(own, *fx.map_arg(more, at.__getitem__))
        whole = softmax.target(torch.cat([own, scores], dim=-1), *softmax.args[1:], **softmax.kwargs)
        return [whole, whole[..., length:]]

    inputs = [one.query, softmax.args[0], *scalars]
    whole, kept = lowering.site(softmax, pair["keys"], inputs, probabilities, (key, softmax.args[1:]))
    softmax.replace_all_uses_with(kept)
    dropouts = [node.args[1:] for node in _between(kept, product) if node.target is aten.dropout.default]

    def added(compose: Compose, whole: Tensor, result: Tensor) -> list[Tensor]:
        part = whole[..., :length]
        for arguments in dropouts:
            part = aten.dropout.default(part, *arguments)
        part = part.to(result.dtype) @ _rows(compose, one, result).to(result.dtype)
        return [result + (part.flatten(0, 1) if len(result.shape) == 3 else part)]

    after = next(iter(product.users))
    (total,) = lowering.site(after, pair["values"], [whole, product], added, (key, tuple(dropouts)))
    mine = lowering.last
    product.replace_all_uses_with(total, delete_user_cb=lambda user: user not in mine)
    lowering.graph.erase_node(softmax)


def _between(node: fx.Node, end: fx.Node) -> list[fx.Node]:
    found = []
    while node is not end:
        node = next(user for user in node.users if not inserted(user) or user is end)
        found.append(node)
    return found
