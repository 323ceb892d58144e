"""What a layer is made of, found in the graph: attention ops, residual sublayers and token embeddings.

Nothing here knows a model's class: a sublayer is a branch that is added back to its own input, attention is a softmax
of queries times keys that multiplies values.
"""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, fx

from .ops import (
    ADDS,
    BIASES,
    CONVOLUTIONS,
    LINEARS,
    PASSING,
    PRODUCTS,
    SCALINGS,
    SDPA,
    SOFTMAX,
    TRANSPOSES,
    VIEWS,
    aten,
)

_CALL = re.compile(r"@\d+")
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def paths(node: fx.Node) -> list[str]:
    """The modules that a node belongs to, outermost first; a module's second call counts as the module."""
    return [_CALL.sub("", entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]


def call_of(node: fx.Node, depth: int = -1) -> str:
    """Which call of a module a node belongs to: at a depth of `paths`, the innermost by default."""
    return (list(node.meta.get("nn_module_stack") or {}) or [""])[depth]


def modules(graph: fx.Graph) -> list[str]:
    """All modules of a graph, in the order of their first node."""
    return list(dict.fromkeys(path for node in graph.nodes for path in paths(node) if path))


def shape_of(node: object) -> tuple:
    """The shape that the trace saw; () for what is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


Scaling = tuple[Callable, tuple]


@dataclass(frozen=True)
class Attention:
    """One attention op.

    Attributes:
        module: the module it is in.
        node: `scaled_dot_product_attention`, or the softmax of an explicit attention.
        query, keys, values: tensors (..., length, head width) at the products; (batch, heads, ...) for SDPA.
        product: of the explicit form, probabilities @ values.
        scalings: of the explicit form, what scales or caps the scores on their way to the softmax: (op, its arguments
            after the scores).
        repeats: how many query heads share a key head that was repeated before.
        cross: keys come from elsewhere than queries.
    """

    module: str
    node: fx.Node
    query: fx.Node
    keys: fx.Node
    values: fx.Node
    product: fx.Node | None
    scalings: tuple[Scaling, ...]
    repeats: int
    cross: bool

    @cached_property
    def heads(self) -> int:
        """Heads of keys and values before any repetition."""
        at = self.keys if self.product is None else self.node
        return shape_of(at)[1] // self.repeats

    def width(self, kind: str) -> int:
        """Width of all keys or values of one position: heads times head width."""
        return self.heads * shape_of(self.query if kind == "keys" else self.values)[-1]

    @property
    def arguments(self) -> dict[str, object]:
        """Arguments of SDPA by name."""
        given = dict(zip(_SDPA_ARGUMENTS, self.node.args, strict=False)) | dict(self.node.kwargs)
        return {"attn_mask": None, "dropout_p": 0.0, "is_causal": False} | given


def attentions(graph: fx.Graph, module: str | None = None) -> list[Attention]:
    """The attention ops of a graph, or of one module and what is in it."""
    found = []
    for node in graph.nodes:
        if node.op != "call_function" or (module is not None and module not in paths(node)):
            continue
        one = _sdpa(node) if node.target is SDPA else _explicit(node) if node.target in SOFTMAX else None
        if one:
            found.append(one)
    return found


def known_attentions(graph: fx.Graph) -> int | None:
    """How many attention ops a graph has; None where there is a softmax over more than classes that is of none."""
    found = {one.node for one in attentions(graph)}
    others = [node for node in graph.nodes if node.target in SOFTMAX and len(shape_of(node)) == 4]
    return None if set(others) - found else len(found)


def _sdpa(node: fx.Node) -> Attention:
    query, keys, values = (*node.args, *node.kwargs.values())[:3]
    cross = _source(query) is not _source(keys)
    return Attention(_inner(node), node, query, keys, values, None, (), _repeats(keys), cross)


def _explicit(node: fx.Node) -> Attention | None:
    product = node
    while product.target not in PRODUCTS:
        onward = [user for user in product.users if user.target in {*VIEWS, *PRODUCTS, aten.dropout.default}]
        if len(onward) != 1:
            return None
        product = onward[0]
    scores, scalings = _scores(node.args[0], ())
    if scores is None or len(shape_of(node)) != 4:
        return None
    at = PRODUCTS[scores.target]
    query, keys = scores.args[at : at + 2]
    while keys.target in SCALINGS | VIEWS:
        if keys.target in SCALINGS:
            scalings = (_scaling(keys), *scalings)
        keys = keys.args[0]
    repeats, cross = _repeats(scores.args[at + 1]), _source(query) is not _source(keys)
    return Attention(_inner(node), node, query, keys, product.args[1], product, scalings, repeats, cross)


def _scores(node: fx.Node, scalings: tuple[Scaling, ...]) -> tuple[fx.Node | None, tuple[Scaling, ...]]:
    """The product of queries and keys under a softmax's input, and the scalings between."""
    if not isinstance(node, fx.Node):
        return None, ()
    if node.target in PRODUCTS:
        alpha = node.kwargs.get("alpha", 1)
        return node, scalings if alpha == 1 else ((aten.mul.Tensor, (alpha,)), *scalings)
    if node.target is aten.tanh.default or (node.target in SCALINGS and not shape_of(node.args[1])):
        return _scores(node.args[0], (_scaling(node), *scalings))
    if node.target in VIEWS:
        return _scores(node.args[0], scalings)
    if node.target in BIASES:
        for argument in node.args:
            found = _scores(argument, scalings)
            if found[0] is not None:
                return found
    return None, ()


def _scaling(node: fx.Node) -> Scaling:
    return node.target, node.args[1:]


def _repeats(node: fx.Node) -> int:
    while node.target in VIEWS:
        before = node.args[0]
        if node.target is aten.expand.default and len(shape_of(node)) == 5 and shape_of(before)[2] == 1:
            return int(shape_of(node)[2])
        node = before
    return 1


def nearest_linear(node: fx.Node) -> fx.Node | None:
    """The nearest linear op above a node."""
    queue, seen = [node], set()
    while queue:
        node = queue.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if linear_input(node) is not None:
            return node
        queue += node.all_input_nodes
    return None


def _source(node: fx.Node) -> fx.Node | None:
    found = nearest_linear(node)
    return found and linear_input(found)


def linear_input(node: fx.Node) -> fx.Node | None:
    """What a linear op reads: `linear`, `addmm`, `mm`, or a product with a transposed parameter. None for other ops."""
    if node.target in LINEARS:
        return node.args[LINEARS[node.target]]
    if node.target is aten.matmul.default:
        weight = node.args[1]
        while weight.target in TRANSPOSES:
            weight = weight.args[0]
        return node.args[0] if weight.op == "get_attr" else None
    return None


def _inner(node: fx.Node) -> str:
    return (paths(node) or [""])[-1]


@dataclass(frozen=True)
class Sublayer:
    """A residual sublayer: `add` = skip + `output`, where the output depends on the skip.

    Attributes:
        kind: "attention" or "feed_forward".
        input: what its first linear op reads, (..., n).
        output: the branch, (..., m), after its dropout.
        add: the addition that reads the output.
        skip: what the output is added to.
    """

    kind: str
    input: fx.Node
    output: fx.Node
    add: fx.Node
    skip: fx.Node


def sublayers(graph: fx.Graph, module: str) -> list[list[Sublayer]]:
    """The residual sublayers of every call of a module, in order; parallel branches of one addition are one each."""
    calls: dict[str, dict[fx.Node, int]] = {}
    for i, node in enumerate(graph.nodes):
        if module in (inner := paths(node)):
            calls.setdefault(call_of(node, inner.index(module)), {})[node] = i
    attending = {one.node for one in attentions(graph, module)}
    return [_sublayers(inside, attending) for inside in calls.values()]


def _sublayers(inside: dict[fx.Node, int], attending: set[fx.Node]) -> list[Sublayer]:
    found = []
    for add in inside:
        if add.target not in ADDS or _inner_sum(add):
            continue
        parents = dict(_terms(add, inside))
        for skip in parents:
            start = skip
            while start.target in PASSING and start.args[0] in inside:  # A residual may be kept in a wider type.
                start = start.args[0]
            branches = {term: _between(start, term, inside) for term in parents if term is not skip}
            if branches and all(_works(nodes) for nodes in branches.values()):
                for output, nodes in branches.items():
                    kind = "attention" if nodes & attending else "feed_forward"
                    found.append(Sublayer(kind, _first_input(nodes, inside, output), output, parents[output], skip))
                break
    return found


def _inner_sum(add: fx.Node) -> bool:
    """Whether an addition is only a term of another one."""
    user = next(iter(add.users), None)
    return len(add.users) == 1 and user.target in ADDS and shape_of(add) == shape_of(user)


def _terms(add: fx.Node, inside: Collection[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The terms of nested additions inside a module, each with the addition that reads it."""
    for term in add.args[:2]:
        if not isinstance(term, fx.Node) or shape_of(term) != shape_of(add):
            continue
        inner = term.args[0] if term.target is aten.dropout.default else term
        nested = (
            list(_terms(inner, inside)) if inner in inside and inner.target in ADDS and len(inner.users) == 1 else []
        )
        yield from nested if len(nested) > 1 else [(term, add)]


def _between(skip: fx.Node, output: fx.Node, inside: dict[fx.Node, int]) -> set[fx.Node]:
    """The nodes on the ways from skip to output, both ends apart from skip's; empty if there is none."""
    reaches: dict[fx.Node, bool] = {skip: True}
    order = sorted(_above(output, inside, inside.get(skip, -1)), key=inside.__getitem__)
    for node in order:
        reaches[node] = any(reaches.get(source, False) for source in node.all_input_nodes)
    return {node for node in order if reaches[node]} if reaches.get(output, False) else set()


def _above(node: fx.Node, inside: dict[fx.Node, int], floor: int) -> set[fx.Node]:
    seen, stack = set(), [node]
    while stack:
        one = stack.pop()
        if one in seen or one not in inside or inside[one] <= floor:
            continue
        seen.add(one)
        stack += one.all_input_nodes
    return seen


def _works(nodes: set[fx.Node]) -> bool:
    """Whether a branch has a weight: x + 0.04 x^3 inside an activation is no sublayer."""
    return any(linear_input(node) is not None or "grouped_mm" in str(node.target) for node in nodes)


def _first_input(nodes: set[fx.Node], inside: dict[fx.Node, int], output: fx.Node) -> fx.Node:
    first = min((node for node in nodes if linear_input(node) is not None), key=inside.__getitem__)
    source = linear_input(first)
    while source.target in VIEWS and len(shape_of(source)) != len(shape_of(output)):
        source = source.args[0]
    return source


def channels_first(output: fx.Node) -> str | None:
    """The op that shows that a branch's last dimension is not the one that its linear layers work on: what makes the
    output, elementwise ops apart, is a convolution or a swap of dimensions."""
    node = output
    while node.op == "call_function":
        name = str(getattr(node.target, "__name__", "")).split(".")[0]
        if name in CONVOLUTIONS or (node.target in TRANSPOSES and len(shape_of(node)) > 2):
            return name
        sources = [one for one in node.all_input_nodes if one.op == "call_function" and shape_of(one)]
        if linear_input(node) is not None or node.target in {SDPA, *PRODUCTS} or len(sources) != 1:
            return None
        node = sources[0]
    return None


KNOWN = "the token ids, *mask*, token_type_ids and position_ids"


def unknown_inputs(graph: fx.Graph, embedding: fx.Node) -> list[str]:
    """Inputs that run along the tokens of an embedding, and whose meaning their names do not say."""
    ids = token_ids(embedding)
    symbol = str(shape_of(ids)[1])
    along = (n for n in graph.find_nodes(op="placeholder") if len(shape_of(n)) == 2 and str(shape_of(n)[1]) == symbol)
    names = [str(node.target) for node in along if node is not ids and node.users]
    return [name for name in names if "mask" not in name and name not in ("token_type_ids", "position_ids")]


def embeddings(graph: fx.Graph, module: str | None = None) -> list[fx.Node]:
    """The embedding ops that read an input of the model as token ids; of one module and what is in it if given.

    Ids of token types are an input too: where several tables are read by inputs, the largest holds the vocabulary.
    """
    found = [
        node
        for node in graph.find_nodes(op="call_function", target=aten.embedding.default)
        if token_ids(node).op == "placeholder" and (module is None or module in paths(node))
    ]
    largest = max((shape_of(node.args[0])[0] for node in found), default=0)
    return [node for node in found if shape_of(node.args[0])[0] == largest]


def token_ids(embedding: fx.Node) -> fx.Node:
    """What an embedding op reads, before any reshaping."""
    node = embedding.args[1]
    while node.target in VIEWS:
        node = node.args[0]
    return node
