"""One ONNX file and many adapters: each equal to its merged model, the base unchanged, a wrong base refused."""

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch

from rewriter import Rule, Session, SubspanError, plan, rewrite, trace, tuned_parameters
from rewriter.adapters.store import save_adapter
from rewriter.base import identity
from rewriter.exchange import export_swappable
from rewriter.export.merge import merge
from rewriter.export.onnx import export_onnx
from rewriter.export.swappable import adapter_for, open_swappable
from rewriter.export.verify import fed
from rewriter.files import write_text
from rewriter.graph.traced import Inputs
from rewriter.pretrained import load_model
from rewriter.session import example_inputs
from rewriter.spec import dump_spec, load_spec
from tests import tiny

TARGET = "model.layers.*.{self_attn.{q,v}_proj,mlp.down_proj}.weight"
CHAINS = {
    "lora": [{"lora": {"rank": 3}}], "other_lora": [{"lora": {"rank": 5, "alpha": 2.0}}], "ssb": ["ssb"],
    "ia3": ["ia3"], "oft": [{"oft": {"block": 4, "terms": 5}}], "vera": [{"vera": {"rank": 2}}],
    "miss": [{"miss": {"rank": 2}}], "delora": [{"delora": {"rank": 2}}], "loha": [{"loha": {"rank": 2}}],
    "hira": [{"hira": {"rank": 2}}], "shira": [{"shira": {"rank": 2}}], "pissa": [{"pissa": {"rank": 2}}],
    "chain": ["ssl", {"dora": {"rank": 2}}],
}  # fmt: skip


def make(folder, base, name, seed=0):
    """A run whose tuned tensors are drawn."""
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps({
        "version": 1, "model": {"name": str(base), "task": "causal-lm"},
        "rules": [{"target": TARGET, "apply": CHAINS[name]}], "export": {"onnx": None},
    }))  # fmt: skip
    spec, out = load_spec(file), folder / name
    pretrained = load_model(spec)
    inputs = example_inputs(spec, pretrained)["eval"]
    traced = trace(pretrained.module, inputs, ("eval",), keep=True)
    model = rewrite(traced, plan(traced, [Rule(target=TARGET, apply=CHAINS[name])]))
    generator = torch.Generator().manual_seed(seed)
    for value in tuned_parameters(model).values():
        value.data += 0.2 * torch.randn(value.shape, generator=generator)
    out.mkdir()
    write_text(out / "spec.yaml", dump_spec(spec))
    save_adapter(model, out / "adapter", spec, {}, identity(str(base), "main"))
    merge(model, traced)
    return out, traced.eval()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swappable")
    return folder, tiny.save_model(folder / "model", "llama")


def answered(session, batch, file=None, model=None):
    options = ort.RunOptions()
    if file is not None:
        adapter = adapter_for(model, file)
        options.add_active_adapter(adapter)
    return session.run(["logits"], fed(session, batch), options)[0]


def in_turn(folder, base, names, onnx=False):
    """Adapters of one session, in turn and once more, beside their merged models, which are ONNX files too."""
    made = {name: make(folder, base, name, i) for i, name in enumerate(names)}
    runs = [run for run, _ in made.values()]
    report = export_swappable(runs[0], runs[1:])
    place = runs[0] / "swappable"
    assert list(report["adapters"]) == list(names) and report["base"] < 1e-5 and report["cache"]
    session, ids = open_swappable(place / "model.onnx"), torch.randint(3, 16, (2, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = answered(session, batch)
    for _ in range(2):
        for name, (run, merged) in made.items():
            found = answered(session, batch, place / f"{name}.onnx_adapter", place / "model.onnx")
            with torch.no_grad():
                expected = merged(**batch).logits.numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
            assert np.abs(found - plain).max() > 1e-3
            if onnx and not (file := run / "merged.onnx").exists():
                export_onnx(merged, Inputs((), batch, {}), file)
                np.testing.assert_allclose(found, answered(open_swappable(file), batch), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(answered(session, batch), plain)


def test_every_adapter_is_its_merged_model_in_one_session(project):
    in_turn(*project, ("lora", "other_lora", "ia3", "chain"))


@pytest.mark.slow
def test_every_method_is_its_merged_file_in_one_session(tmp_path):
    """Of methods that start from the frozen weight one graph has one."""
    base = tiny.save_model(tmp_path / "model", "llama")
    in_turn(tmp_path, base, [name for name in CHAINS if name != "pissa"], onnx=True)
    (tmp_path / "more").mkdir()
    in_turn(tmp_path / "more", base, ["lora", "pissa"])
    with pytest.raises(SubspanError, match="chain and pissa can't stand in one graph: each has a method that starts"):
        export_swappable(tmp_path / "chain", [tmp_path / "more/pissa"])


@pytest.mark.slow
def test_experts_stand_as_batched_products(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.TARGET", "model.layers.*.self_attn.{q,v}_proj.weight")
    base = tiny.save_model(tmp_path / "model", "mixtral")
    run, merged = make(tmp_path, base, "lora")
    assert export_swappable(run)["cache"]
    ids = torch.randint(3, 16, (2, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    place = run / "swappable"
    session = open_swappable(place / "model.onnx")
    found = answered(session, batch, place / "lora.onnx_adapter", place / "model.onnx")
    with torch.no_grad():
        np.testing.assert_allclose(found, merged(**batch).logits.numpy(), rtol=1e-5, atol=1e-5)


def test_another_base_a_changed_file_and_rows_are_refused(project, tmp_path):
    _, base = project
    (one, _), other = make(tmp_path, base, "lora"), tiny.save_model(tmp_path / "model", "llama", seed=5)
    wrong, _ = make(tmp_path, other, "ssb")
    with pytest.raises(SubspanError, match="of another base than"):
        export_swappable(one, [wrong])
    assert not (one / "swappable").exists()
    with pytest.raises(SubspanError, match="two runs are called lora"):
        export_swappable(one, [one])
    export_swappable(one)
    export_swappable(wrong)
    place, there = one / "swappable", wrong / "swappable"
    with pytest.raises(SubspanError, match="made for another base than"):
        adapter_for(there / "model.onnx", place / "lora.onnx_adapter")
    (place / "lora.onnx_adapter").write_bytes((there / "ssb.onnx_adapter").read_bytes())
    with pytest.raises(SubspanError, match=r"not the file that its lora\.json was written with"):
        adapter_for(place / "model.onnx", place / "lora.onnx_adapter")


def test_a_run_with_a_head(tmp_path):
    spec = tiny.project(tmp_path)
    runs = []
    steps = ("{lora: {rank: 4}}", "{hira: {rank: 2}}", "{adalora: {rank: 4}}", "{fish_mask: {density: 0.1}}")
    for name, step in zip("abcd", steps, strict=True):
        Session(spec, f"rules.0.apply=[{step}]", "train.epochs=1").tune(tmp_path / name)
        runs.append(tmp_path / name)
    report = export_swappable(runs[0], runs[1:])
    assert max(report["adapters"].values()) < 1e-5 and "base" not in report


def test_what_onnx_has_no_operator_for_is_said(project, tmp_path, monkeypatch):
    monkeypatch.setitem(CHAINS, "hra", [{"hra": {"rank": 2}}])
    run, _ = make(tmp_path, project[1], "hra")
    with pytest.raises(SubspanError, match="can't export to ONNX"):
        export_swappable(run)
