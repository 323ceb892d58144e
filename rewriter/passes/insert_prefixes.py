"""Insert prefixes: rows before the keys and the values of attention, with the mask grown by as much."""

import torch
from torch import fx

from ..algebra import Computed, Prepend, Value
from ..plan import Plan, Site
from ..sublayers import Attention, attentions, shape_of
from .lowering import Lowering

aten = torch.ops.aten


def insert_prefixes(lowering: Lowering, plan: Plan, dtype: torch.dtype) -> fx.Graph:
    """The graph with every attention op of the plan attending to its prefix, which no mask hides.

    Causal masks stay causal for the sequence; key heads shared by groups of query heads share their prefix too.

    Args:
        lowering: of a traced graph, which is changed in place and returned.
        plan: the sites.
        dtype: storage type of the model.
    """
    sites: dict[str, dict[str, Site]] = {}
    for site in plan.sites:
        if site.kind in ("keys", "values"):
            sites.setdefault(site.place, {})[site.kind] = site
    located = [(one, sites[one.module]) for one in attentions(lowering.graph) if one.module in sites]
    for one, pair in located:
        insert = _insert_sdpa if one.product is None else _insert_explicit
        insert(lowering, one, pair, dtype)
    return lowering.graph


def _rows(lowering: Lowering, one: Attention, site: Site, dtype: torch.dtype) -> Value:
    """P, shape (heads, length, head width), repeated as the op's heads are."""
    phi = lowering.compose(site, Computed(None), dtype)
    assert isinstance(phi, Prepend)
    rows = phi.rows.unflatten(-1, (one.heads, -1)).transpose(0, 1)
    return rows if one.repeats == 1 else rows.repeat_interleave(one.repeats, 0)


def _insert_sdpa(lowering: Lowering, one: Attention, pair: dict[str, Site], dtype: torch.dtype) -> None:
    wrap, node = lowering.wrap, one.node
    arguments = one.arguments
    with lowering.serving(node, pair["keys"]):
        query, keys, values = (wrap(arguments[name]) for name in ("query", "key", "value"))
        grown = []
        for kind, value in (("keys", keys), ("values", values)):
            rows = _rows(lowering, one, pair[kind], dtype)
            grown.append(torch.cat([rows + torch.zeros_like(value[..., :1, :]), value], dim=-2))
        length = pair["keys"].chain[0][1].length
        mask = _grow(query, keys, wrap(arguments["attn_mask"]), arguments, length)
    rest = {name: value for name, value in arguments.items() if name in ("scale", "enable_gqa")}
    node.args = (
        arguments["query"],
        *(value.node for value in grown),
        None if mask is None else mask.node,
        arguments["dropout_p"],
        False,
    )
    node.kwargs = rest


def _grow(query: Value, keys: Value, mask: Value | None, arguments: dict, length: int) -> Value | None:
    """The mask with `length` columns before it that are never hidden."""
    if mask is None:
        if not arguments["is_causal"]:
            return None
        size = query.size(-2)
        mask = query.new_ones((size, keys.size(-2)), dtype=torch.bool).tril()
        return torch.cat([query.new_ones((size, length), dtype=torch.bool), mask], dim=-1)
    value = arguments["attn_mask"].meta["val"]
    column = mask[..., :1]
    open_ = torch.ones_like(column) if value.dtype == torch.bool else torch.zeros_like(column)
    return torch.cat([open_.expand(*[-1] * (value.ndim - 1), length), mask], dim=-1)


def _insert_explicit(lowering: Lowering, one: Attention, pair: dict[str, Site], dtype: torch.dtype) -> None:
    """The prefix has scores of its own in the softmax, and adds its part to the product with the values.

    So whatever the model adds to the scores of the sequence, by position, stays as it is.
    """
    wrap, softmax, product = lowering.wrap, one.node, one.product
    heads, flat = one.heads * one.repeats, len(shape_of(one.query)) == 3
    length = pair["keys"].chain[0][1].length
    with lowering.serving(softmax, pair["keys"]):
        query = wrap(one.query)
        query = query.unflatten(0, (-1, heads)) if flat else query
        scores = query @ _rows(lowering, one, pair["keys"], dtype).to(query.dtype).transpose(-2, -1)
        for op, arguments in one.scalings:
            scores = lowering.call(op, scores.node, *arguments)
        together = torch.cat([scores, wrap(softmax.args[0])], dim=-1)
        whole = lowering.call(softmax.target, together.node, *softmax.args[1:], **softmax.kwargs)
        kept = whole[..., length:]
    softmax.replace_all_uses_with(kept.node)
    kept.node.meta = {**softmax.meta, **kept.node.meta}
    dropouts = [node for node in _chain(kept.node, product) if node.target is aten.dropout.default]
    after = next(iter(product.users))
    with lowering.serving(after, pair["values"]):
        part = whole[..., :length]
        for node in dropouts:
            part = aten.dropout.default(part, *node.args[1:])
        rows = _rows(lowering, one, pair["values"], dtype)
        part = part.to(wrap(product).dtype) @ rows.to(wrap(product).dtype)
        total = wrap(product) + (part.flatten(0, 1) if len(shape_of(product)) == 3 else part)
    product.replace_all_uses_with(total.node, delete_user_cb=lambda user: "subspan" not in user.meta)
    lowering.graph.erase_node(softmax)


def _chain(node: fx.Node, end: fx.Node) -> list[fx.Node]:
    found = []
    while node is not end:
        node = next(user for user in node.users if "subspan" not in user.meta or user is end)
        found.append(node)
    return found
