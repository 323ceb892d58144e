"""Half precision: a float32 file becomes one of float16 or bfloat16; statistics, angles and softmax stay in float32."""

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir
import torch

from ..errors import SubspanError
from .onnx import save
from .verify import PAST, PRESENT

# Normalisations with a node of their own sum in float32 whatever they read (attribute stash_type).
WIDE = frozenset(
    {"Softmax", "LogSoftmax", "ReduceMean", "ReduceSum", "ReduceL2", "Pow", "Sqrt", "Exp", "Log", "CumSum"}
)
_ANGLES = frozenset({"Sin", "Cos"})
_OWN = frozenset({"Cast", "CastLike", "ConstantOfShape", "Range", "RandomNormal", "RandomUniform", "EyeLike"})
_SUMS = frozenset({"Add", "Mul", "Div", "Sub", "Reciprocal", "Max", "Min", "Neg"})
_STATISTICS = (1, 2)  # Outputs of a normalisation: mean and inverse deviation, in float32 always.
_TYPES = {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}


def halve(source: Path, file: Path, dtype: ir.DataType) -> None:
    """Write a float32 file in half precision; inputs and outputs stay in float32, a cache is in float16 where all is.

    Weights too large for the type become its largest value: such are the masks of attention.

    Raises:
        SubspanError: a node has a graph of its own.
    """
    model = ir.load(source)
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    if any(attr.type in graphs for node in model.graph for attr in node.attributes.values()):
        raise SubspanError("a node has a graph of its own")
    _Halved(model.graph, dtype).write()
    save(model, file)


class _Halved:
    """A graph on its way: which values are in half precision by now, and the casts of each."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType):
        self.graph, self.dtype = graph, dtype
        self.casts: dict[tuple[str, ir.DataType], ir.Value] = {}
        self.floats = {v.name for v in (*graph.inputs, *graph.initializers.values()) if v.dtype == ir.DataType.FLOAT}
        self.halves: set[str] = set()
        self.angles = _before(node for node in graph if node.op_type in _ANGLES)

    def write(self) -> None:
        graph, cached = self.graph, self.dtype == ir.DataType.FLOAT16
        outputs = [value for value in graph.outputs if value.dtype == ir.DataType.FLOAT]
        for value in graph.inputs:
            if cached and value.name.startswith(PAST):
                self._now_half(value)
        for node in list(graph):
            self._convert(node)
        for value in outputs:
            if value.name in self.halves and not (cached and value.name.startswith(PRESENT)):
                name, where = value.name, graph.outputs.index(value)
                value.name = f"{name}_half"
                wide = self._cast(value, ir.DataType.FLOAT, value.producer(), known=True)
                wide.name, wide.shape = name, value.shape
                graph.outputs[where] = wide
        for name in [name for name, value in graph.initializers.items() if not value.uses()]:
            del graph.initializers[name]

    def _convert(self, node: ir.Node) -> None:
        read = [value for value in node.inputs if value is not None]
        floats = [value for value in read if value.name in self.floats]
        if node.op_type == "Constant":
            self.floats.update(v.name for v in node.outputs if v.dtype == ir.DataType.FLOAT)
            return
        made = [v for v in node.outputs if v.dtype == ir.DataType.FLOAT or (v.dtype is None and floats)]
        self.floats.update(value.name for value in made)
        if node.op_type in _OWN:
            return
        wide = node.op_type in WIDE | _ANGLES or node in self.angles or self._statistic(node, floats)
        for i, value in enumerate(node.inputs):
            if value is not None and value.name in self.floats and (value.name in self.halves) == wide:
                node.replace_input_with(i, self._cast(value, ir.DataType.FLOAT if wide else self.dtype, node))
        if not wide:
            for i, value in enumerate(node.outputs):
                if value in made and not (node.op_type.endswith("Normalization") and i in _STATISTICS):
                    self._now_half(value)

    def _statistic(self, node: ir.Node, floats: list[ir.Value]) -> bool:
        """Whether a node goes on with what a wide one made, and with numbers: the variance and its epsilon."""
        held = [value for value in floats if value.producer() is not None and not self._number(value)]
        return (
            node.op_type in _SUMS
            and bool(held)
            and all(value.name not in self.halves and value.producer().op_type in WIDE | _SUMS for value in held)
            and all(self._number(value) for value in floats if value not in held)
        )

    @staticmethod
    def _number(value: ir.Value) -> bool:
        return value.const_value is not None and value.const_value.size == 1

    def _now_half(self, value: ir.Value) -> None:
        self.floats.add(value.name)
        self.halves.add(value.name)
        value.dtype = self.dtype

    def _cast(self, value: ir.Value, dtype: ir.DataType, node: ir.Node, known: bool = False) -> ir.Value:
        """A value in another type: a weight once and for all, what is computed by a node."""
        key = value.name, dtype
        if key in self.casts:
            return self.casts[key]
        held = self.graph.initializers.get(value.name)
        if held is not None:
            limit = torch.finfo(_TYPES[dtype]).max
            wide = torch.from_numpy(held.const_value.numpy().copy()).clamp(-limit, limit)
            tensor = ir.tensor(wide.to(_TYPES[dtype]), name=f"{value.name}_half")
            made = ir.Value(name=tensor.name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor)
            self.graph.register_initializer(made)
        else:
            suffix = "float" if dtype == ir.DataType.FLOAT else "half"
            cast = ir.node("Cast", [value], {"to": dtype.value}, name=f"{value.name}_to_{suffix}")
            made = cast.outputs[0]
            made.name, made.dtype, made.shape = f"{value.name}_{suffix}", dtype, value.shape
            producer = value.producer()
            if known or producer is not None:
                self.graph.insert_after(producer or node, cast)
            else:
                self.graph.insert_before(self.graph[0], cast)
        if dtype == self.dtype:
            self._now_half(made)
        else:
            self.floats.add(made.name)
        self.casts[key] = made
        return made


def _before(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    """The nodes whose floats reach the given ones: of positions as angles, which half precision can't count."""
    found, todo = set(), list(nodes)
    while todo:
        node = todo.pop()
        for value in node.inputs:
            producer = value.producer() if value is not None and value.dtype == ir.DataType.FLOAT else None
            if producer is not None and producer not in found:
                found.add(producer)
                todo.append(producer)
    return found
