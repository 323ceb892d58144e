"""Half precision of a float32 file: what is rounded, and what is not."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from rewriter import Inputs, SubspanError, export_onnx
from rewriter.export.half import halve


class Rotary(nn.Module):
    """Angles of positions, a root mean square, and a softmax under a mask that float16 can't hold."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
        self.rates = nn.Parameter(torch.tensor([1.0, 0.37, 0.01, 0.003]))

    def forward(self, x):
        positions = torch.arange(x.shape[1], device=x.device).float()
        angles = positions[:, None] * self.rates[None] * 1000.0
        turned = x * torch.cat([angles.cos(), angles.sin()], dim=-1)
        normed = turned * torch.rsqrt(turned.pow(2).mean(-1, keepdim=True) + 1e-6)
        scores = (normed @ self.weight) @ normed.transpose(1, 2)
        mask = torch.ones_like(scores).triu(1) * torch.finfo(torch.float32).min
        return {"out": (scores + mask).softmax(-1) @ turned}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    file = tmp_path_factory.mktemp("half") / "plain.onnx"
    x = torch.randn(2, 5, 8)
    export_onnx(Rotary().eval(), Inputs((), {"x": x}, {"x": {0: "batch", 1: "sequence"}}), file)
    return file


def test_float16_is_as_near_as_its_rounding(plain, tmp_path):
    halve(plain, tmp_path / "half.onnx", ir.DataType.FLOAT16)
    x = np.random.default_rng(0).standard_normal((3, 40, 8), dtype=np.float32)
    found, expected = (
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for file in (plain, tmp_path / "half.onnx")
    )
    # Products of 8 terms up to about 5, each rounded by 2^-11: angles up to 40,000 in half precision would give over 1.
    assert 1e-5 < np.abs(found - expected).max() < 5e-2


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_angles_statistics_and_softmax_stay_wide(plain, tmp_path, dtype):
    halve(plain, tmp_path / "half.onnx", dtype)
    model = ir.load(tmp_path / "half.onnx")
    kinds = {node.op_type: {value.dtype for value in node.outputs} for node in model.graph}
    for name in ("Cos", "Sin", "Pow", "ReduceMean", "Sqrt", "Softmax"):
        assert kinds.get(name, {ir.DataType.FLOAT}) == {ir.DataType.FLOAT}
    assert kinds["MatMul"] == {dtype}
    assert [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)] == [ir.DataType.FLOAT] * 2
    assert all(np.isfinite(v.const_value.numpy().astype(np.float64)).all() for v in model.graph.initializers.values())


def test_a_node_with_a_graph_of_its_own_is_refused(tmp_path):
    body = ir.Graph([], [], nodes=[], name="body")
    node = ir.Node("", "If", [ir.val("c")], [ir.AttrGraph("then_branch", body)], name="if")
    graph = ir.Graph([node.inputs[0]], node.outputs, nodes=[node], opset_imports={"": 18}, name="main")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "if.onnx")
    with pytest.raises(SubspanError, match="a graph of its own"):
        halve(tmp_path / "if.onnx", tmp_path / "half.onnx", ir.DataType.FLOAT16)
