"""Verification sees what differs, and fails closed; ONNX files say what they are."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from rewriter import Inputs, SubspanError, batches, differences, export_onnx, onnx_stage, torch_stage
from rewriter.files import aside, write_text
from tests.architectures import build

# The others are exported in test_tasks.
EXPORTED = ["deberta-v2", "modernbert", "qwen3"]


def sample():
    return [{"x": torch.ones(2, 3)}]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda y: y, 0.0),
        (lambda y: y + 0.25, 0.25),
        (lambda y: np.where(np.arange(3) == 1, np.nan, y), np.inf),
        (lambda y: y * np.inf, np.inf),
        (lambda y: y[:, :2], np.inf),
    ],
)
def test_differences_fail_closed(change, expected):
    reference = lambda batch: [batch["x"].numpy(), batch["x"].numpy()]  # noqa: E731
    stage = lambda batch: [batch["x"].numpy(), change(batch["x"].numpy())]  # noqa: E731
    assert differences(reference, {"stage": stage}, sample()) == {"stage": expected}
    assert differences(stage, {"stage": stage}, sample())["stage"] in (0.0, np.inf)


def test_a_reference_that_is_not_finite_fails():
    stage = lambda batch: [batch["x"].numpy() * np.nan]  # noqa: E731
    assert differences(stage, {"same": stage}, sample()) == {"same": np.inf}


def test_batches_have_padding_and_several_sizes():
    _, inputs = build("bert", meta=True)
    made = list(batches(inputs, 64, longest=20))
    assert {tuple(b["input_ids"].shape) for b in made} == {(n, length) for n in (1, 2, 5) for length in (3, 16, 20)}
    assert any((b["attention_mask"] == 0).any() for b in made)
    assert all(b["attention_mask"].sum(1).min() >= 1 and b["input_ids"].max() < 64 for b in made)


@pytest.mark.parametrize("name", EXPORTED)
def test_onnx_of_an_architecture(name, tmp_path):
    model, inputs = build(name, torch.float32)
    export_onnx(model, inputs, tmp_path / "model.onnx", metadata={"labels": ["a", "b"], "task": "t"})
    found = differences(torch_stage(model), {"onnx": onnx_stage(tmp_path / "model.onnx")}, batches(inputs, 64, 33))
    assert found["onnx"] < 1e-4
    proto = onnx.load(tmp_path / "model.onnx")
    assert [value.name for value in proto.graph.input] == list(inputs.kwargs)
    assert proto.graph.output[0].name == "logits"
    assert proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {p.key: p.value for p in proto.metadata_props} == {"labels": '["a", "b"]', "task": "t"}
    assert proto.opset_import[0].version == 18


def test_onnx_of_a_plain_module(tmp_path):
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    inputs = Inputs(args=(torch.zeros(3, 4),), dynamic={0: {0: "rows"}})
    export_onnx(net, inputs, tmp_path / "net.onnx", opset=20)
    proto = onnx.load(tmp_path / "net.onnx")
    assert proto.opset_import[0].version == 20
    x = torch.randn(7, 4)
    (found,) = onnx_stage(tmp_path / "net.onnx")({proto.graph.input[0].name: x})
    np.testing.assert_allclose(found, net(x).detach().numpy(), atol=1e-6)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "rows"


def test_onnx_of_positional_and_keyword_inputs(tmp_path):
    """Each input goes under the name of its own parameter."""

    class Scaled(nn.Module):
        def forward(self, x, *, scale):
            return {"y": x * scale}

    inputs = Inputs((torch.zeros(3, 4),), {"scale": torch.ones(5, 1, 1)}, {0: {0: "rows"}, "scale": {0: "scales"}})
    export_onnx(Scaled(), inputs, tmp_path / "net.onnx")
    proto = onnx.load(tmp_path / "net.onnx")
    axes = {v.name: v.type.tensor_type.shape.dim[0].dim_param for v in proto.graph.input}
    assert axes == {"x": "rows", "scale": "scales"} and [v.name for v in proto.graph.output] == ["y"]
    x, scale = torch.randn(2, 4), torch.randn(6, 1, 1)
    (found,) = onnx_stage(tmp_path / "net.onnx")({"x": x, "scale": scale})
    np.testing.assert_allclose(found, (x * scale).numpy(), atol=1e-6)


def test_what_onnx_cannot_express_is_one_line(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.lstsq(x, x).solution

    with pytest.raises(SubspanError) as caught:
        export_onnx(Odd(), Inputs(args=(torch.eye(3),)), tmp_path / "x.onnx")
    assert "\n" not in str(caught.value) and not (tmp_path / "x.onnx").exists()


def test_unfinished_files_never_look_finished(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), aside(tmp_path / "a", tmp_path / "b") as (a, b):
        a.write_text("new")
        b.mkdir()
        raise RuntimeError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]
    with aside(tmp_path / "a", tmp_path / "b") as (a, b):
        a.write_text("new")
        b.mkdir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"] and (tmp_path / "a").read_text() == "new"
    write_text(tmp_path / "c", "text")
    assert (tmp_path / "c").read_text() == "text" and len(list(tmp_path.iterdir())) == 3
