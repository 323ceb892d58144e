"""Files for a GPU: every node has a kernel there."""

import json
import shutil

import onnx_ir as ir
import onnxruntime
import pytest
import torch

from rewriter import Session
from rewriter.export.kernels import TABLE, fallen, lacking, registered
from rewriter.export.verify import open_file
from tests.tiny import project

pytestmark = pytest.mark.slow

GPU = torch.cuda.is_available()
needs_a_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


def file_of(tmp_path, *nodes, dtype=ir.DataType.FLOAT16, opset=18):
    x = ir.val("x", dtype, [2, 2])
    made = [ir.node(op, [x], domain=domain, name=op) for domain, op in nodes]
    for node in made:
        node.outputs[0].dtype, node.outputs[0].shape = dtype, ir.Shape([2, 2])
    outputs = [node.outputs[0] for node in made]
    graph = ir.Graph([x], outputs, nodes=made, opset_imports={"": opset, "com.microsoft": 1}, name="main")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "file.onnx")
    return tmp_path / "file.onnx"


@pytest.mark.parametrize(
    "dtype, lacks",
    [
        (ir.DataType.FLOAT16, ["Det (float16)", "Nothing (float16)"]),
        (ir.DataType.BFLOAT16, ["Det (bfloat16)", "HardSigmoid (bfloat16)", "Nothing (bfloat16)"]),
    ],
)
def test_what_has_no_kernel_is_named_once(tmp_path, dtype, lacks):
    nodes = [("", "Relu"), ("", "Det"), ("", "HardSigmoid"), ("com.microsoft", "Nothing"), ("", "Det")]
    assert lacking(file_of(tmp_path, *nodes, dtype=dtype)) == lacks


def test_the_table_is_of_this_runtime_s_line():
    assert json.loads(TABLE.read_text())["onnxruntime"].split(".")[0] == onnxruntime.__version__.split(".")[0]


@needs_a_gpu
def test_the_table_is_what_the_provider_registers():
    assert json.loads(TABLE.read_text())["kernels"] == registered()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    Session(project(folder), "train.max_steps=2", "export.latency=[[2, 8]]").tune(folder / "run")
    return folder / "run"


def exported(tuned, folder):
    shutil.copytree(tuned, folder / "run")
    Session(folder / "run" / "spec.yaml").export(folder / "run", target="cuda", measure=True)
    found = json.loads((folder / "run" / "export.json").read_text())
    return found, {one["name"]: one for one in found["variants"]}


@needs_a_gpu
def test_files_run_there_and_nothing_falls_back(tuned, tmp_path):
    found, by_name = exported(tuned, tmp_path)
    assert all(one["holds"] for one in by_name.values()), found
    assert {"eager-float16", "compile-float16", "eager-bfloat16"} <= set(found["beside"])
    for one in by_name.values():
        file = tmp_path / "run" / "onnx" / one["file"]
        session = open_file(file, "cuda")
        assert session.get_providers()[0] == "CUDAExecutionProvider"
        assert fallen(file, session) == lacking(file) == []


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_files_are_checked_by_the_table(tuned, tmp_path):
    found, by_name = exported(tuned, tmp_path)
    for name in ("float32", "float32-fused", "float16"):
        assert by_name[name]["holds"], by_name[name]["reason"]
        assert lacking(tmp_path / "run" / "onnx" / by_name[name]["file"]) == []
    assert "bfloat16" in by_name and "Could not find an implementation" in by_name["bfloat16"]["reason"]
    assert found["target"] == "cuda" and by_name[found["chosen"]]["holds"]
