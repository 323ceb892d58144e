"""Runs that go on: from their own checkpoint to the same bits, and from one of an earlier version."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rewriter import Rule, Session, example_inputs, load_adapter, load_model, load_spec, trace
from rewriter.training.checkpoint import checkpoints
from tests import tiny
from tests.pipelines.test_run import succeeds

pytestmark = pytest.mark.slow

OLD = Path(__file__).parents[1] / "data" / "run-0.1.0"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The run of version 0.1.0 in a folder of its own; its spec's paths are relative."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def run(spec, out, **options):
    Session(spec).tune(out, **options)


def adapter(folder):
    return load_file(folder / "adapter" / "adapter.safetensors")


def test_every_schedule_in_one_run_resumes_to_the_same_bits(old, tmp_path):
    """One spec with all of them, two more that only stand inside modules, and a checkpoint of a half-done epoch."""
    spec, out = load_spec(old / "run" / "spec.yaml"), tmp_path / "run"
    more = [
        Rule(target="bert.embeddings", apply=[{"prompt": {"length": 3}}]),
        Rule(target="bert.pooler.dense.weight", apply=[{"dora": {"rank": 2}}]),
    ]
    spec = spec.model_copy(update={"rules": [*spec.rules, *more]})
    run(spec, out)
    unbroken, plans = adapter(out), (out / "plan.json").read_text()
    shutil.rmtree(out / "adapter")
    (out / "metrics.json").unlink()
    (out / "plan.json").unlink()  # What resume needs lies in the checkpoint.
    kept, *later = checkpoints(out / "checkpoints")
    for one in later:
        shutil.rmtree(one)
    assert kept.name == "checkpoint-5"
    run(spec, out, resume=True)
    resumed = adapter(out)
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
    assert (out / "plan.json").read_text() == plans


def test_an_earlier_version_s_checkpoint_goes_on(old):
    """To that version's adapter: float32 over seven steps, on whatever machine, within 1e-4."""
    expected = adapter(old / "run")
    shutil.rmtree(old / "run" / "adapter")
    run(load_spec(old / "run" / "spec.yaml"), old / "run", resume=True)
    found = adapter(old / "run")
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in expected.items()
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def test_an_earlier_version_s_adapter_loads_and_ships(old):
    spec = load_spec(old / "run" / "spec.yaml")
    pretrained = load_model(spec)
    graph = trace(pretrained.model, example_inputs(pretrained.model, spec.model.task), modes=("eval",))
    tensors = load_file(old / "expected.safetensors")
    expected = tensors.pop("logits")
    with torch.no_grad():
        found = load_adapter(graph, old / "run" / "adapter").eval()(**tensors).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    (old / "run" / "metrics.json").write_text('{"validation": {"accuracy": 0.5}}')
    succeeds("export", old / "run", "--no-measure")
    assert json.loads((old / "run" / "verify.json").read_text())["max_abs_diff"] <= 1e-4


def test_lora_plus_gives_b_a_rate_of_its_own(tmp_path):
    """After one step of AdamW, entries have moved by about their learning rate: small gradients by a little less."""
    spec = load_spec(tiny.project(tmp_path), ["train.max_grad_norm=0", "train.schedule=constant", "train.epochs=0.1"])
    step = {"lora": {"rank": 4, "ratio": 16.0}}
    rules = [Rule(target="bert.encoder.layer.*.attention.self.query.weight", apply=[step])]
    run(spec.model_copy(update={"rules": rules}), tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    b = next(value for name, value in tensors.items() if name.endswith("layer.0.attention.self.query.weight.lora.b"))
    assert 0.9 * 16 * 1e-2 < float(b.abs().max()) <= 16 * 1e-2
