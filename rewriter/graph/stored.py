"""A traced graph as text and back: ops by name, shapes as expressions of the inputs' sizes, no code."""

import ast
import builtins
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from sympy import Symbol
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from .traced import Inputs, Range, Signature

_FUNCTIONS = {"getattr": builtins.getattr, **{f"operator.{name}": getattr(operator, name) for name in operator.__all__}}
_NAMES = {function: name for name, function in reversed(_FUNCTIONS.items())}
_KINDS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Pow: operator.pow, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_CALLS: dict[str, Callable] = {"Max": torch.sym_max, "Min": torch.sym_min, "Mod": operator.mod}


@dataclass(frozen=True)
class Trace:
    """A graph of a module, without the module's tensors.

    Attributes:
        graph: reads tensors by name.
        signature: of its inputs and outputs.
        constants: what it reads that is no tensor of the module.
        conditions: on the sizes of inputs, what `signature.guard` checks, as torch.export writes it; None: unknown.
    """

    graph: fx.Graph
    signature: Signature
    constants: Mapping[str, Tensor]
    conditions: tuple[str, ...] | None


def to_text(trace: Trace) -> str:
    """All of a trace but the values of its constants, as JSON.

    Raises:
        ValueError: something in it has no text.
    """
    if trace.conditions is None:
        raise ValueError("what the trace is valid for is not known")
    places: dict[Any, Any] = {node: i for i, node in enumerate(trace.graph.nodes)}
    for node in trace.graph.find_nodes(op="placeholder"):
        for size in node.meta["val"].shape:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                places.setdefault(size.node.expr, f"s{len(places)}")
    stacks: dict[str, int] = {}
    nodes = []
    for node in trace.graph.nodes:
        own = node.meta.get("nn_module_stack")
        stack = json.dumps(own and [[key, *map(str, one)] for key, one in own.items()])
        given = [_written(one, places) for one in (node.args, node.kwargs, node.meta.get("val"))]
        nodes.append([node.op, node.name, _name(node), *given, stacks.setdefault(stack, len(stacks))])
    signature = trace.signature
    specs = [pytree.treespec_dumps(one) for one in (signature.inputs, signature.outputs)]
    ranges = [[one.place, one.name, one.dimension, one.least, one.most] for one in signature.ranges]
    whole = {"nodes": nodes, "stacks": [json.loads(one) for one in stacks], "specs": specs, "ranges": ranges}
    return json.dumps(whole | {"conditions": trace.conditions})


def from_text(text: str, inputs: Inputs, constants: Mapping[str, Tensor]) -> Trace:
    """The trace of a text, with shapes on the CPU.

    Args:
        inputs: the examples that it was traced with.
        constants: of the trace.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: the text is none of a trace with these inputs.
    """
    whole = json.loads(text)
    specs = [pytree.treespec_loads(one) for one in whole["specs"]]
    ranges = tuple(Range(*one) for one in whole["ranges"])
    conditions = tuple(whole["conditions"])
    inputs = inputs.to("cpu")
    leaves = pytree.tree_leaves((inputs.args, inputs.kwargs))
    placeholders = [entry for entry in whole["nodes"] if entry[0] == "placeholder"]
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    sizes = _sizes(fake, placeholders, leaves, ranges)
    stacks = [stack if stack is None else {key: tuple(one) for key, *one in stack} for stack in whole["stacks"]]
    graph, made, values = fx.Graph(), [], {}
    with fake:
        for op, name, target, args, kwargs, value, stack in whole["nodes"]:
            function = _function(target) if op == "call_function" else target
            given = _read(args, made, sizes), _read(kwargs, made, sizes)
            output = op == "output"
            node = graph.output(given[0][0]) if output else graph.create_node(op, function, *given, name=name)
            if stacks[stack] is not None:
                node.meta["nn_module_stack"] = dict(stacks[stack])
            key = json.dumps(value)
            # Nodes of one shape share what stands for their value, as long as none is told apart by it.
            if value is not None and (key not in values or op != "call_function"):
                values[key] = _read(value, made, sizes)
            if value is not None:
                node.meta["val"] = values[key]
            made.append(node)
    names = [entry[1] for entry in placeholders]
    return Trace(graph, Signature(*specs, ranges, _guard(conditions, names)), dict(constants), conditions)


def _name(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.namespace}.{node.target._opname}.{node.target._overloadname}"
    if node.target not in _NAMES:
        raise ValueError(f"no name for {node.target}")
    return _NAMES[node.target]


def _function(name: str) -> Callable:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, op, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), op), overload)


def _written(value: Any, places: Mapping[Any, Any]) -> Any:
    """An argument, or the value of a node, as JSON has it: what is no number, text or list has a key of its own.

    Args:
        places: node -> its place, and symbol of a size -> its name.
    """
    if isinstance(value, fx.Node):
        return {"node": places[value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        parts = [_written(one, places) for one in value]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, dict):
        return {"dict": {key: _written(one, places) for key, one in value.items()}}
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return {"size": str(expression.xreplace({one: Symbol(places[one]) for one in expression.free_symbols}))}
    if isinstance(value, torch.device) and value.type == "cpu":
        return {"device": "cpu"}
    if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu":
        shape, strides = ([_written(one, places) for one in sizes] for sizes in (value.shape, value.stride()))
        return {"tensor": [shape, strides, str(value.dtype), value.requires_grad]}
    for key, kind in _KINDS.items():
        if isinstance(value, kind):
            return {key: str(value).removeprefix("torch.")}
    raise ValueError(f"no text for {type(value).__name__}")


def _read(value: Any, made: Sequence[fx.Node], sizes: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_read(one, made, sizes) for one in value]
    if not isinstance(value, dict):
        return value
    ((key, what),) = value.items()
    if key == "node":
        return made[what]
    if key == "tuple":
        return tuple(_read(one, made, sizes) for one in what)
    if key == "dict":
        return {name: _read(one, made, sizes) for name, one in what.items()}
    if key == "size":
        return _evaluated(what, sizes)
    if key == "device":
        return torch.device(what)
    if key == "tensor":
        shape, strides, dtype, grad = what
        both = ([_read(one, made, sizes) for one in some] for some in (shape, strides))
        return torch.empty_strided(*both, dtype=_constant("dtype", dtype), device="cpu", requires_grad=grad)
    return _constant(key, what)


def _constant(key: str, name: str) -> Any:
    found = getattr(torch, name.removeprefix("torch."))
    if not isinstance(found, _KINDS[key]):
        raise ValueError(f"{name} is no {key}")
    return found


def _sizes(
    fake: FakeTensorMode, placeholders: Sequence[list], leaves: Sequence[Any], ranges: Sequence[Range]
) -> dict[str, torch.SymInt]:
    """Symbol of the text -> a size of its own, with the example's as its hint."""
    from torch._dynamo.source import ConstantSource

    found: dict[str, torch.SymInt] = {}
    for place, (entry, leaf) in enumerate(zip(placeholders, leaves, strict=True)):
        shape = entry[5]["tensor"][0]
        new = [isinstance(one, dict) and one["size"].isidentifier() and one["size"] not in found for one in shape]
        kinds = [DimDynamic.DYNAMIC if one else DimDynamic.STATIC for one in new]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        example = fake.from_tensor(leaf, source=ConstantSource(f"input_{place}"), symbolic_context=context)
        found |= {shape[i]["size"]: example.shape[i] for i, one in enumerate(new) if one}
    for one in ranges:
        symbol = placeholders[one.place][5]["tensor"][0][one.dimension]["size"]
        if one.most is not None and symbol in found:
            torch._check(found[symbol] <= one.most)
    return found


def _evaluated(expression: str, names: Mapping[str, Any]) -> Any:
    """The value of an arithmetic expression.

    Raises:
        ValueError: it is anything else.
    """

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) in (int, bool, str):
            return node.value
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            return _BINARY[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _BINARY:
            return _BINARY[type(node.ops[0])](value(node.left), value(node.comparators[0]))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
            return _CALLS[node.func.id](*map(value, node.args))
        if isinstance(node, ast.Subscript):  # L['input_ids'].size()[1]
            inner = node.value
            if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute) and inner.func.attr == "size":
                return value(inner.func.value).shape[value(node.slice)]
            return value(inner)[value(node.slice)]
        raise ValueError(f"{expression} is no arithmetic expression")

    return value(ast.parse(expression, mode="eval").body)


def _guard(conditions: Sequence[str], names: Sequence[str]) -> Callable[..., None] | None:
    """A check of flat inputs against conditions."""

    def check(*leaves: Tensor) -> None:
        given = {"L": dict(zip(names, leaves, strict=True))}
        for one in conditions:
            if not _evaluated(one, given):
                raise AssertionError(f"Guard failed: {one}")

    return check if conditions else None
