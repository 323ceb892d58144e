"""Files that ship: each is compared and timed, and one that fails stops no other."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import onnx
import pytest
import torch

from rewriter import Session, SubspanError
from rewriter.export import choose, latency, ship, variants
from rewriter.export.onnx import export_onnx
from rewriter.export.verify import open_file
from rewriter.spec.models import Export
from tests.cases.tiny import GPT2, task_spec
from tests.pipelines.test_run import call
from tests.tiny import project

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    Session(project(folder), "train.max_steps=2").tune(folder / "run")
    return folder / "run"


@pytest.fixture
def fresh(tuned, tmp_path):
    """A copy of the tuned run."""
    shutil.copytree(tuned, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tmp_path_factory.mktemp("plain") / "model.onnx"


@pytest.fixture
def run(fresh, plain, monkeypatch):
    """A copy whose file in float32, equal for all copies, is written by torch.onnx for the first of them alone."""

    def written(module, inputs, file, *how):
        if not plain.exists():
            export_onnx(module, inputs, plain, *how)
        shutil.copyfile(plain, file)

    monkeypatch.setattr(ship, "export_onnx", written)
    return fresh


def exported(run, **more):
    Session(run / "spec.yaml").export(run, **more)
    found = json.loads((run / "export.json").read_text())
    return found, {one["name"]: one for one in found["variants"]}


def edited(run, old, new):
    file = run / "spec.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_the_names_are_those_of_the_spec():
    (some, _) = Export.model_fields["variants"].annotation.__args__
    assert list(some.__args__[0].__args__) == list(variants.VARIANTS)


def test_all_that_make_sense_are_compared_and_timed(run):
    edited(run, "latency: null", "latency: [[1, 8], [3, 16]]")
    found, by_name = exported(run, measure=True)
    assert list(by_name) == ["float32", "float32-fused", "int8", "int8-fused", "int8-dynamic", "int4"]
    assert found["target"] == "cpu" and by_name[found["chosen"]]["holds"]
    for name in ("float32", "float32-fused"):
        assert by_name[name]["holds"] and by_name[name]["agreement"] == 1.0
        assert by_name[name]["mean_abs_diff"] <= by_name[name]["max_abs_diff"] < 1e-5
    assert by_name["float32-fused"]["fused_attention"] == 2 and by_name["float32"]["fused_attention"] == 0
    assert 1e-6 < by_name["int8"]["max_abs_diff"] < by_name["int4"]["max_abs_diff"] < 0.5
    held = [one for one in by_name.values() if one["holds"]]
    assert all(set(one["latency_ms"]) == {"1x8", "3x16"} and min(one["latency_ms"].values()) > 0 for one in held)
    assert all(set(found["beside"][name]) == {"1x8", "3x16"} for name in ("eager", "products"))
    files = {file.name for file in (run / "onnx").glob("*.onnx")}
    assert files == {"model.onnx", *(one["file"] for one in held)}
    shipped = run / "onnx" / "model.onnx"
    assert shipped.read_bytes() == (run / "onnx" / by_name[found["chosen"]]["file"]).read_bytes()
    assert shipped.stat().st_size == by_name[found["chosen"]]["bytes"]
    assert (run / "onnx" / "config.json").is_file() and (run / "onnx" / "tokenizer.json").is_file()


def test_unmeasured_it_is_the_safe_one(run):
    found, by_name = exported(run)
    assert found["chosen"] == "float32" and list(by_name) == ["float32"] and by_name["float32"]["latency_ms"] == {}


def test_one_that_fails_stops_no_other(run, monkeypatch):
    def broken(source, file):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(variants.VARIANTS, "int8", dataclasses.replace(variants.VARIANTS["int8"], make=broken))
    edited(run, "variants: null", "variants: [int8, float32-fused, int4]")
    found, by_name = exported(run)
    assert by_name["int8"] | {"reason": None} == by_name["int8"] | {"reason": None, "holds": False, "file": None}
    assert by_name["int8"]["reason"] == "can't be made: no such kernel"
    assert found["chosen"] == "float32-fused" and not (run / "onnx" / "model_fp32.onnx").exists()


def test_what_costs_too_much_is_not_shipped(run, monkeypatch):
    strict = dataclasses.replace(variants.VARIANTS["int4"], agreement=1.01)
    monkeypatch.setitem(variants.VARIANTS, "int4", strict)
    edited(run, "variants: null", "variants: [int4]")
    found, by_name = exported(run)
    assert "of its decisions are the tuned run's; 101.0% at least" in by_name["int4"]["reason"]
    assert found["chosen"] == "float32" and (run / "onnx" / "model.onnx").is_file()


def test_without_rows_nothing_says_what_rounding_weights_costs(run):
    edited(run, "variants: null", "variants: [float32, int8]")
    data = Session(run / "spec.yaml").spec.data.files
    os.rename(data, f"{data}.away")
    try:
        found, by_name = exported(run)
    finally:
        os.rename(f"{data}.away", data)
    assert (
        by_name["int8"]["reason"].startswith("nothing says what it costs: no such file")
        and found["chosen"] == "float32"
    )


def test_an_attention_that_is_not_one_node_is_said(run, monkeypatch):
    monkeypatch.setattr(choose, "attention_nodes", lambda file: 1)
    edited(run, "variants: null", "variants: [float32-fused]")
    _, by_name = exported(run)
    assert by_name["float32-fused"]["reason"] == "1 of 2 attentions are not one node: no rule of onnxscript matches"


def test_half_precision_keeps_its_ends_wide(run):
    edited(run, "variants: null", "variants: [float16]")
    found, by_name = exported(run, target="cuda")
    assert by_name["float16"]["holds"], by_name["float16"]["reason"]
    assert found["chosen"] == "float16"
    model = onnx.load(run / "onnx" / "model_fp16.onnx")
    kinds = {one.name: one.data_type for one in model.graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds.values()
    assert {one.type.tensor_type.elem_type for one in model.graph.output} == {onnx.TensorProto.FLOAT}


def test_a_decoder_is_judged_by_its_metric_and_its_next_tokens(tmp_path, monkeypatch):
    import transformers as hf

    spec = task_spec(
        tmp_path,
        hf.GPT2Config(**GPT2),
        "CausalLM",
        "causal-lm",
        "**.c_attn.weight",
        train={"max_steps": 2, "batch_size": 4},
    )
    strict = dataclasses.replace(variants.VARIANTS["int4"], agreement=1.1)
    monkeypatch.setitem(variants.VARIANTS, "int4", strict)
    session = Session(spec.model_copy(update={"export": Export(variants=["int8", "int4"])}))
    session.tune(tmp_path / "run")
    session.export()
    int8, int4 = json.loads((tmp_path / "run" / "export.json").read_text())["variants"]
    for one in (int8, int4):
        assert one["metric"] == pytest.approx(50, rel=0.3)
        assert one["holds"] == (one["agreement"] >= variants.VARIANTS[one["name"]].agreement)
    assert 0.5 < int4["agreement"] <= int8["agreement"] <= 1 and "of its decisions" in int4["reason"]


def test_where_nothing_that_is_named_holds_float32_ships_and_is_listed(run, monkeypatch):
    monkeypatch.setitem(variants.VARIANTS, "int4", dataclasses.replace(variants.VARIANTS["int4"], agreement=1.01))
    edited(run, "variants: null", "variants: [int4]")
    found, by_name = exported(run, measure=True)
    assert found["chosen"] == "float32" and list(by_name) == ["int4", "float32"]
    assert by_name["int4"]["file"] is None and by_name["float32"]["file"] == "model_fp32.onnx"
    assert by_name["float32"]["bytes"] == (run / "onnx" / "model.onnx").stat().st_size
    assert by_name["float32"]["latency_ms"]


def test_what_mixes_rows_is_counted_in_large_batches_too(run, monkeypatch):
    sizes, batched = [], choose.compare.Truth.batched
    monkeypatch.setattr(choose.compare.Truth, "batched", lambda self, size: sizes.append(size) or batched(self, size))
    edited(run, "variants: null", "variants: [float32, int8, int8-dynamic]")
    exported(run)
    assert sizes == [64]


def test_weights_beside_their_file_have_its_name(fresh, monkeypatch):
    """As transformers.js looks for them, in both folders; of what ONNX Runtime quantises too."""
    monkeypatch.setattr("rewriter.export.onnx.LIMIT", 1000)
    monkeypatch.setattr("rewriter.export.variants.LIMIT", 1000)
    edited(fresh, "variants: null", "variants: [float32, int8, int8-dynamic]")
    _, by_name = exported(fresh)
    assert all(one["holds"] for one in by_name.values())
    shutil.move(fresh, fresh.with_name("elsewhere"))
    for folder in ("onnx", "merged/onnx"):
        files = sorted((fresh.with_name("elsewhere") / folder).glob("*.onnx"))
        assert [file.name for file in files] == [
            "model.onnx",
            "model_fp32.onnx",
            "model_int8.onnx",
            "model_quantized.onnx",
        ]
        for file in files:
            proto = onnx.load(file, load_external_data=False)
            said = [entry.value for one in proto.graph.initializer for entry in one.external_data]
            assert f"{file.name}_data" in said
            open_file(file)


def test_a_length_that_the_model_does_not_take(run):
    edited(run, "latency: null", "latency: [[1, 8], [1, 4096]]")
    with pytest.raises(SubspanError, match=r"export\.latency\[1\]: the model takes at most \d+ tokens"):
        exported(run, measure=True)
    assert not (run / "onnx").exists()


def test_products_of_a_module():
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    seen = []
    with latency._Products() as mode:
        seen.append(module(torch.randn(3, 4)))
    assert [tuple(run().shape) for run in mode.found] == [(3, 8), (3, 2)]
    torch.testing.assert_close(mode.found[-1](), seen[0])


def test_runs_have_their_turns(monkeypatch):
    turns = []
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    found = latency.interleaved({name: lambda name=name: turns.append(name) for name in "ab"})
    assert set(found) == {"a", "b"} and turns == ["a", "b", "a", "a", "b", "b"]
    turns.clear()
    monkeypatch.setattr(latency, "SECONDS", 1e-3)
    latency.interleaved({name: lambda name=name: turns.append(name) for name in "ab"})
    assert turns[2:10] == ["a"] * 4 + ["b"] * 4


def test_the_command_says_what_ships(run):
    out = call("export", run, "--no-measure")
    assert out.exit_code == 0 and "float32" in out.stdout and "model.onnx" in out.stdout


def test_what_the_page_says_of_loading(run):
    exported(run)
    (page,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "shipping.md").read_text(), re.DOTALL)
    space = {}
    exec(page.replace("runs/mine", str(run)), space)
    assert len(space["answers"]) == 2 and set(space["answers"]) <= {"negative", "positive"}


def test_the_page_has_every_variant_and_its_limits():
    page = (ROOT / "docs" / "shipping.md").read_text()
    for name, one in variants.VARIANTS.items():
        assert f"| `{name}` | `{one.file}` | {', '.join(one.targets)} |" in page
