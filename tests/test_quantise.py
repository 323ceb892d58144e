"""Models in few bits: which weights are, and that every method tunes and merges on them as on the weights they mean."""

import copy
import importlib.util
import json

import pytest
import torch

from rewriter import Rule, Session, SpecError, SubspanError, merge, plan, rewrite, trace, tuned_parameters
from rewriter.adapters.ties import fingerprint
from rewriter.algebra import Format, Quantised, held_bytes
from rewriter.algebra.quantised import METHODS
from rewriter.exchange import export_swappable
from rewriter.quantise import dequantise, forms_of, quantise, requantise
from rewriter.spec import Quantise
from tests.architectures import ARCHITECTURES, UNLIKE, build, inputs_of, traced
from tests.test_rewrite import MATRIX
from tests.tiny import project

pytestmark = pytest.mark.xdist_group("architectures")

INT4 = Quantise.model_construct(method="int4", group=8)  # The models are too small for what a spec allows.


def pair(name, how=INT4):
    """A quantised architecture, traced; the graphs of the plain one with the weights that its bits mean; inputs."""
    model, inputs = build(name)
    quantise(model, how)
    own, dense = trace(model, inputs), traced(name)[2].clone()
    values = copy.deepcopy(model)
    dequantise(values)
    for key, value in values.named_parameters():
        dense.get_parameter(key).data = value.data
    dense.recompile()
    return own, dense, inputs


@pytest.fixture(scope="module")
def bert():
    return pair("bert")


def numbers(traced, rules, name, inputs):
    """Of a rewrite of the train graph, moved from its start: outputs, gradients and merged weights."""
    tuned = rewrite(traced.clone("train"), plan(traced, rules))
    leaves = tuned_parameters(tuned)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, value in sorted(leaves.items()):
            value += 0.05 * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    x = inputs_of(name, inputs, 3, 9)
    torch.manual_seed(0)  # Of dropout.
    outputs = tuned.train()(**x).logits
    outputs.square().mean().backward()
    gradients = {key: value.grad for key, value in leaves.items()}
    other = traced.clone("train")
    merge(tuned, other)
    merged = {site.place: other.get_parameter(site.place) for site in tuned.plan.sites}
    assert not any(isinstance(value, Quantised) for value in merged.values())
    return {"outputs": outputs.detach(), "gradients": gradients, "merged": merged}


@pytest.mark.parametrize("chain", MATRIX, ids=str)
def test_every_method_on_few_bits_is_that_on_what_they_mean(bert, chain):
    rules = [Rule(target="bert.encoder.layer.1.{attention.self.{query,value},output.dense}.weight", apply=chain)]
    own, dense, inputs = bert
    # The very products in another order at most: 1e-9 of float64.
    torch.testing.assert_close(
        numbers(own, rules, "bert", inputs), numbers(dense, rules, "bert", inputs), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", UNLIKE)
def test_every_architecture(name):
    own, dense, inputs = pair(name)
    assert forms_of(own)
    rules = [Rule(target=ARCHITECTURES[name].linear, apply=[{"lora": {"rank": 2}}])]
    near = {"rtol": 1e-3, "atol": 1e-4} if name == "mixtral" else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(numbers(own, rules, name, inputs), numbers(dense, rules, name, inputs), **near)


def test_tables_and_the_tokens_head_are_in_int8_by_rows_and_ties_stay():
    model, _ = build("llama", torch.float32)
    quantise(model, INT4)
    forms, width = {name: form for name, (form, _) in forms_of(model).items()}, model.config.hidden_size
    assert forms["model.embed_tokens.weight"] == Format("int8", width)
    assert forms["model.layers.0.mlp.up_proj.weight"] == Format("int4", 8)
    assert not any("norm" in name for name in forms)
    head = model.lm_head.weight
    assert head is model.model.embed_tokens.weight or forms["lm_head.weight"] == Format("int8", width)


def test_experts_are_quantised():
    model, _ = build("mixtral", torch.float32)
    quantise(model, INT4)
    assert {
        len(model.get_parameter(name).shape) for name, (form, _) in forms_of(model).items() if form.method == "int4"
    } == {2, 3}


def test_batches_of_weights_that_are_no_experts_stay_and_are_said():
    model, _ = build("mixtral", torch.float32)
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.__class__ = type("Several", (type(module),), {})
    (note,) = quantise(model, INT4)
    assert note.startswith("4 weights of more than two dimensions are not quantised, e.g. model.layers.0.mlp.experts.")


def test_rows_that_do_not_divide_stay_and_are_said():
    with pytest.raises(SpecError, match=r"nothing to quantise"):
        quantise(torch.nn.Sequential(torch.nn.Linear(48, 8)), Quantise(method="int4", group=32))
    layer = torch.nn.Linear(48, 8)
    notes = quantise(torch.nn.Sequential(torch.nn.Linear(64, 8), layer), Quantise(method="int4", group=32))
    assert notes == ("1 weights are not quantised, e.g. 1.weight: their rows do not divide into groups of 32",)
    assert not isinstance(layer.weight, Quantised)


def test_dense_again_and_in_few_bits_again():
    model, _ = build("bert", torch.float32)
    quantise(model, INT4)
    forms = forms_of(model)
    before = {name: model.get_parameter(name).dense() for name in forms}
    dequantise(model)
    assert not forms_of(model)
    requantise(model, forms)
    for name, value in before.items():
        torch.testing.assert_close(model.get_parameter(name).dense(), value, rtol=0, atol=1e-6)


def test_a_fingerprint_is_of_the_bits(bert):
    own, dense, _ = bert
    assert fingerprint(own) != fingerprint(dense)
    assert fingerprint(own) == fingerprint(pair("bert")[0])


def written(folder, **quantised):
    folder.mkdir(exist_ok=True)
    spec = project(folder)
    one = ARCHITECTURES["bert"]
    config = one.config(**{**one.options, "pad_token_id": 0, "hidden_size": 64, "intermediate_size": 64})
    one.model._from_config(config).bert.save_pretrained(folder / "model")
    spec.write_text(spec.read_text().replace("  labels:", f"  quantise: {json.dumps(quantised)}\n  labels:"))
    return spec


def test_a_plan_counts_the_bits_without_a_weight(tmp_path):
    """Those of the run itself."""
    session = Session(written(tmp_path, method="int4", group=32))
    pretrained = session.prepare().pretrained
    found = session.plan()
    assert found.weight_bytes == sum(map(held_bytes, pretrained.model.parameters()))
    assert found.weight_bytes < 0.25 * 4 * found.total_parameters
    assert not any("classifier" in name for name in forms_of(pretrained.model))


def test_a_run_is_merged_and_verified_and_what_few_bits_again_would_cost_is_said(tmp_path):
    session = Session(written(tmp_path, method="int8", group=32), "export.onnx=null")
    session.tune(tmp_path / "run")
    report = session.export()
    again = report["requantised"]
    assert report["max_abs_diff"] < 1e-5 and report["agreement"]["checkpoint"] == 1.0
    assert (again["method"], again["group"]) == ("int8", 32) and 0 < again["max_abs_diff"] < 0.5
    assert set(again["metrics"]) == {"accuracy", "loss"} and 0 < again["agreement"] <= 1
    assert "quantization_config" not in json.loads((tmp_path / "run/merged/config.json").read_text())


def test_an_adapter_of_other_bits_is_refused(tmp_path):
    session = Session(written(tmp_path, method="int8", group=32))
    session.tune(tmp_path / "run")
    spec = (tmp_path / "run/spec.yaml").read_text()
    (tmp_path / "run/spec.yaml").write_text(spec.replace("int8", "int4"))
    with pytest.raises(SubspanError, match=r"another model\.quantise\.method"):
        Session(tmp_path / "run/spec.yaml").export(tmp_path / "run")


FIRST, *OTHERS = METHODS


@pytest.mark.parametrize("method", [FIRST, *(pytest.param(one, marks=pytest.mark.slow) for one in OTHERS)])
def test_swappable_files_are_of_the_dense_base(tmp_path, method):
    Session(written(tmp_path, method=method, group=32)).tune(tmp_path / "run")
    report = export_swappable(tmp_path / "run")
    assert max(report["adapters"].values()) < 1e-5


def test_a_missing_library_is_said_before_weights_load(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("rewriter.packed.find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(SubspanError, match=r"model\.quantise\.method: it needs bitsandbytes: pip install"):
        Session(written(tmp_path, method="nf4")).plan()
