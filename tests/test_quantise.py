"""Models in few bits: which weights are, and that every method tunes and merges on them as on the weights they mean."""

import copy
import importlib.util
import json
import re

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from rewriter import Rule, Session, SpecError, SubspanError, merge, plan, rewrite, trace, tuned_parameters
from rewriter.adapters.ties import fingerprint
from rewriter.algebra import Format, Quantised, held_bytes
from rewriter.algebra.quantised import METHODS
from rewriter.exchange import export_swappable
from rewriter.quantise import dequantise, forms_of, quantise, requantise
from rewriter.spec import Quantise
from tests.architectures import ARCHITECTURES, UNLIKE, build, inputs_of
from tests.test_rewrite import MATRIX
from tests.tiny import make_tokenizer, project

INT4 = Quantise.model_construct(method="int4", group=8)  # The models are too small for what a spec allows.


def pair(name, how=INT4):
    """A quantised architecture and its dense copy, both traced, and the model's inputs."""
    model, inputs = build(name)
    quantise(model, how)
    dense = copy.deepcopy(model)
    dequantise(dense)
    return trace(model, inputs), trace(dense, inputs), inputs


@pytest.fixture(scope="module")
def bert():
    return pair("bert")


def numbers(traced, rules, name, inputs):
    """Of a rewrite moved from its start: outputs, gradients and merged weights."""
    tuned = rewrite(traced, plan(traced, rules))
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
    other = traced.clone()
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
    session = Session(written(tmp_path, method="int8", group=32))
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


LLAMA = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 3,
}  # fmt: skip
TEXT = """\
version: 1
model: {{name: {model}, task: causal-lm}}
data: {{format: text, files: {data}, columns: {{text: text}}, split: {{validation: 4, seed: 0}}, max_length: 16}}
rules: [{{target: "model.layers.*.self_attn.*_proj.weight", apply: [{{lora: {{rank: 2}}}}]}}]
train: {{epochs: 1, batch_size: 4}}
export: {{onnx: null}}
"""


GPT2 = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 3}
BERT = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def by_bitsandbytes(folder, config=None, auto="AutoModelForCausalLM", **how):
    """A spec over a checkpoint that transformers and bitsandbytes wrote, and that model as they load it."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    kind = getattr(hf, auto)
    kind.from_config(config or hf.LlamaConfig(**LLAMA)).save_pretrained(folder / "dense")
    load = lambda name, **more: kind.from_pretrained(folder / name, device_map="cpu", **more)  # noqa: E731
    load("dense", quantization_config=hf.BitsAndBytesConfig(**how)).save_pretrained(folder / "few")
    make_tokenizer().save_pretrained(folder / "few")
    (folder / "data.txt").write_text("\n".join(["good film was the plot", "bad plot and a film"] * 12))
    (folder / "spec.yaml").write_text(TEXT.format(model=folder / "few", data=folder / "data.txt"))
    return folder / "spec.yaml", load("few")


NESTED = {"bnb_4bit_use_double_quant": True}
# How a checkpoint is stored, and how far its model may be from bitsandbytes': its int8 rounds activations too.
STORED = [({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **more}, 0.0) for more in ({}, NESTED)]
STORED += [({"load_in_8bit": True}, 0.01)]


@pytest.mark.parametrize(("how", "near"), STORED, ids=["nf4", "nf4 nested", "int8"])
def test_checkpoints_of_bitsandbytes_are_taken_over_with_their_codes(tmp_path, how, near):
    spec, theirs = by_bitsandbytes(tmp_path, **how)
    session = Session(spec)
    own, planned = session.prepare().pretrained.model, session.plan()
    assert planned.weight_bytes == sum(map(held_bytes, own.parameters())) < 0.5 * 4 * planned.total_parameters
    rows = torch.arange(12).view(2, 6)
    torch.testing.assert_close(own(rows).logits, theirs(rows).logits, rtol=0, atol=near)
    session.tune(tmp_path / "run")
    report = session.export()
    assert report["max_abs_diff"] < 1e-5 and report["requantised"]["method"] in ("nf4", "int8")
    assert "quantization_config" not in json.loads((tmp_path / "run/merged/config.json").read_text())
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "run/merged").dtype == torch.float32


@pytest.mark.parametrize(("how", "near"), STORED, ids=["nf4", "nf4 nested", "int8"])
def test_layers_that_have_inputs_first_are_read_the_other_way_round(tmp_path, how, near):
    spec, theirs = by_bitsandbytes(tmp_path, hf.GPT2Config(**GPT2), **how)
    spec.write_text(
        spec.read_text().replace("model.layers.*.self_attn.*_proj", "transformer.h.*.{attn.c_attn,mlp.c_proj}")
    )
    session = Session(spec)
    own, planned = session.prepare().pretrained.model, session.plan()
    assert isinstance(own.transformer.h[0].attn.c_attn.weight, Quantised)
    assert planned.weight_bytes == sum(map(held_bytes, own.parameters()))
    rows = torch.arange(12).view(2, 6)
    torch.testing.assert_close(own(rows).logits, theirs(rows).logits, rtol=1e-5, atol=max(near, 1e-5))
    if "bnb_4bit_use_double_quant" in how:
        session.tune(tmp_path / "run")
        assert session.export()["max_abs_diff"] < 1e-5


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForSequenceClassification"])
@pytest.mark.parametrize("how", [how for how, _ in STORED], ids=["nf4", "nf4 nested", "int8"])
def test_a_head_beside_bits_is_new_or_the_checkpoint_s_and_dense(tmp_path, how, auto):
    skipped = {"llm_int8_skip_modules": ["classifier", "pooler"]}
    spec, _ = by_bitsandbytes(tmp_path, hf.BertConfig(**BERT), auto, **how, **skipped)
    (tmp_path / "other").mkdir()
    text = project(tmp_path / "other").read_text()
    spec.write_text(text.replace(re.search(r"name: (.*)", text)[1], str(tmp_path / "few")))
    session = Session(spec, "export.onnx=null")
    own = session.prepare().pretrained
    head = own.model.classifier.weight
    assert type(head) is torch.nn.Parameter and ("classifier.weight" in own.new) == (auto == "AutoModel")
    if not own.new:
        torch.testing.assert_close(
            head.data, load_file(tmp_path / "few/model.safetensors")["classifier.weight"].float()
        )
    elif "load_in_4bit" in how:
        session.tune(tmp_path / "run")
        assert session.export()["max_abs_diff"] < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_type_that_is_asked_for_is_what_is_computed_in(tmp_path, dtype):
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16}
    spec, _ = by_bitsandbytes(tmp_path, **how)
    own = {p.dtype for p in Session(spec).prepare().pretrained.model.parameters()}
    assert own == {torch.float32}
    session = Session(spec, f"model.dtype={dtype}")
    model = session.prepare().pretrained.model
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert session.plan().weight_bytes == sum(map(held_bytes, model.parameters()))


@pytest.mark.parametrize("method", METHODS)
def test_swappable_files_are_of_the_dense_base(tmp_path, method):
    Session(written(tmp_path, method=method, group=32)).tune(tmp_path / "run")
    report = export_swappable(tmp_path / "run")
    assert max(report["adapters"].values()) < 1e-5


def packed(numbers, bits):
    """Numbers from 0 on, the first in the lowest bits of int32, along the last dimension."""
    some = numbers.long().unflatten(-1, (-1, 32 // bits)) << torch.arange(0, 32, bits)
    return some.sum(-1).to(torch.int32)


def by_compressed_tensors(folder, bits, group, symmetric, **more):
    """A spec over a checkpoint as compressed-tensors packs it, and the model that it means."""
    torch.manual_seed(0)
    model, held = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), {}
    half = 2 ** (bits - 1)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            weight = layer.weight.data
            values = weight.unflatten(-1, (-1, group or weight.shape[1]))
            low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
            scale = values.abs().amax(-1) / (half - 1) if symmetric else (high - low) / (2 * half - 1)
            zero = torch.full_like(scale, half) if symmetric else (-low / scale).round()
            codes = (values / scale[..., None] + zero[..., None]).round().clamp(0, 2 * half - 1)
            layer.weight.data = ((codes - zero[..., None]) * scale[..., None]).flatten(-2)
            held[f"{name}.weight_packed"] = packed(codes.flatten(-2), bits)
            held[f"{name}.weight_scale"] = scale
            held[f"{name}.weight_shape"] = torch.tensor(weight.shape)
            if not symmetric:
                held[f"{name}.weight_zero_point"] = packed(zero.t().contiguous(), bits).t().contiguous()
    model.save_pretrained(folder / "few")
    rest = {key: value for key, value in load_file(folder / "few/model.safetensors").items() if "_proj" not in key}
    save_file(rest | held, folder / "few/model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": bits, "type": "int", "strategy": "group" if group else "channel", "symmetric": symmetric}
    kind = {"targets": ["Linear"], "weights": weights | {"group_size": group}} | more
    section = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": kind}}
    config = json.loads((folder / "few/config.json").read_text())
    (folder / "few/config.json").write_text(json.dumps(config | {"quantization_config": section}))
    make_tokenizer().save_pretrained(folder / "few")
    (folder / "data.txt").write_text("\n".join(["good film was the plot", "bad plot and a film"] * 12))
    (folder / "spec.yaml").write_text(TEXT.format(model=folder / "few", data=folder / "data.txt"))
    return folder / "spec.yaml", model.eval()


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 32, True), (4, 32, False), (4, None, True), (8, 32, True), (8, None, True)]
)
def test_checkpoints_of_compressed_tensors_are_taken_over_with_their_codes(tmp_path, bits, group, symmetric):
    spec, meant = by_compressed_tensors(tmp_path, bits, group, symmetric)
    session = Session(spec)
    own, planned = session.prepare().pretrained.model, session.plan()
    assert planned.weight_bytes == sum(map(held_bytes, own.parameters())) < 0.5 * 4 * planned.total_parameters
    for name, value in meant.named_parameters():
        found = own.get_parameter(name)
        assert isinstance(found, Quantised) == ("_proj" in name)
        torch.testing.assert_close(found.dense() if "_proj" in name else found, value)
    if symmetric != (bits == 4):
        session.tune(tmp_path / "run")
        report = session.export()
        assert report["max_abs_diff"] < 1e-5 and report["requantised"]["method"] == f"int{bits}"


@pytest.mark.parametrize(
    "more",
    [
        {"input_activations": {"num_bits": 8, "type": "int"}},
        {"format": "naive-quantized"},
        {"weights": {"num_bits": 8, "type": "float"}},
    ],
    ids=["activations", "format", "floats"],
)
def test_other_checkpoints_of_compressed_tensors_are_refused(tmp_path, more):
    spec, _ = by_compressed_tensors(tmp_path, 4, 32, True, **more)
    with pytest.raises(SubspanError, match=r"spec.yaml:2:.*the base model is stored as .* is read"):
        Session(spec).plan()


ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # Of eight outputs, from the lowest bits on, as AutoAWQ packs them.


def by_rows(folder, kind, config, group, layout, **more):
    """A spec over a checkpoint as GPTQ or AWQ packs it, number by number, and the model that it means."""
    torch.manual_seed(0)
    model, held = hf.AutoModelForCausalLM.from_config(config), {}
    generator = torch.Generator().manual_seed(2)
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear | Conv1D) or name == "lm_head":
            continue
        n, m = reversed(layer.weight.shape) if isinstance(layer, torch.nn.Linear) else layer.weight.shape
        codes = torch.randint(16, (n, m), generator=generator)
        zeros = torch.randint(16, (n // (group or n), m), generator=generator)
        scales = torch.rand(zeros.shape, generator=generator).half() / 100
        weight = ((codes.unflatten(0, (-1, group or n)) - zeros[:, None]) * scales[:, None].float()).flatten(0, 1)
        layer.weight.data = weight.t().contiguous() if isinstance(layer, torch.nn.Linear) else weight
        if kind == "gptq":
            own = zeros if layout == "gptq_v2" else (zeros - 1) % 16
            parts = {"qweight": packed(codes.t(), 4).t(), "qzeros": packed(own, 4)}
            parts["g_idx"] = (torch.arange(n) // (group or n)).int()
        else:
            own = (one.unflatten(1, (-1, 8))[..., ORDER].flatten(1) for one in (codes, zeros))
            parts = dict(zip(("qweight", "qzeros"), (packed(one, 4) for one in own), strict=True))
        held |= {f"{name}.{key}": value.contiguous() for key, value in (parts | {"scales": scales}).items()}
    model.save_pretrained(folder / "few")
    rest = load_file(folder / "few/model.safetensors")
    packs = {f"{key.rpartition('.')[0]}.weight" for key in held}
    rest = {key: value for key, value in rest.items() if key not in packs}
    save_file(rest | held, folder / "few/model.safetensors", metadata={"format": "pt"})
    section = {"quant_method": kind, "bits": 4, "group_size": group or -1, "checkpoint_format": layout} | more
    written = json.loads((folder / "few/config.json").read_text())
    (folder / "few/config.json").write_text(json.dumps(written | {"quantization_config": section}))
    make_tokenizer().save_pretrained(folder / "few")
    (folder / "data.txt").write_text("\n".join(["good film was the plot", "bad plot and a film"] * 12))
    (folder / "spec.yaml").write_text(TEXT.format(model=folder / "few", data=folder / "data.txt"))
    return folder / "spec.yaml", model.eval(), held


@pytest.mark.parametrize("config", [hf.LlamaConfig(**LLAMA), hf.GPT2Config(**GPT2)], ids=["llama", "gpt2"])
@pytest.mark.parametrize(
    ("kind", "group", "layout"),
    [("gptq", 32, "gptq"), ("gptq", 32, None), ("gptq", None, "gptq_v2"), ("awq", 32, "gemm"), ("awq", None, None)],
)
def test_checkpoints_of_gptq_and_awq_are_taken_over_with_their_codes(tmp_path, kind, group, layout, config):
    spec, meant, held = by_rows(tmp_path, kind, config, group, layout)
    if config.model_type == "gpt2":
        spec.write_text(spec.read_text().replace("model.layers.*.self_attn.*_proj", "transformer.h.*.*.c_*"))
    session = Session(spec)
    own, planned = session.prepare().pretrained.model, session.plan()
    assert planned.weight_bytes == sum(map(held_bytes, own.parameters()))
    for name, value in meant.named_parameters():
        found = own.get_parameter(name)
        few = f"{name.removesuffix('.weight')}.qweight" in held
        assert isinstance(found, Quantised) == few
        torch.testing.assert_close(found.dense() if few else found, value)


def test_a_checkpoint_of_gptq_is_tuned_and_merged(tmp_path):
    spec, *_ = by_rows(tmp_path, "gptq", hf.LlamaConfig(**LLAMA), 32, "gptq")
    session = Session(spec)
    session.tune(tmp_path / "run")
    report = session.export()
    assert report["max_abs_diff"] < 1e-5 and report["requantised"]["method"] == "int4"


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("gptq", {"bits": 3}, "stored by gptq in 3 bits as gptq; only 4 bits as gptq or gptq_v2 is read"),
        ("gptq", {"is_marlin_format": True}, "in 4 bits as marlin"),
        ("awq", {"checkpoint_format": None, "version": "GEMV"}, "by awq in 4 bits as gemv; only 4 bits as gemm is"),
        ("gptq", {"desc_act": True}, "self_attn.*in the order of desc_act, which is not read"),
    ],
)
def test_other_checkpoints_of_gptq_and_awq_are_refused_before_weights_load(tmp_path, kind, more, said):
    spec, *_ = by_rows(tmp_path, kind, hf.LlamaConfig(**LLAMA), 32, "gptq" if kind == "gptq" else "gemm", **more)
    if "desc_act" in more:
        files = load_file(tmp_path / "few/model.safetensors")
        files |= {name: value.flip(0).contiguous() for name, value in files.items() if name.endswith("k_proj.g_idx")}
        save_file(files, tmp_path / "few/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SubspanError, match=rf"spec.yaml:2:.*{said}"):
        Session(spec).plan()


def test_other_checkpoints_in_few_bits_are_refused_before_weights_load(tmp_path):
    spec, _ = by_bitsandbytes(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="fp4")
    with pytest.raises(SubspanError, match="is stored in fp4; only nf4 is read"):
        Session(spec).plan()
    config = tmp_path / "few/config.json"
    config.write_text(config.read_text().replace('"bitsandbytes"', '"hqq"'))
    with pytest.raises(SubspanError, match=r"is quantised \(hqq\), which is not supported"):
        Session(spec).plan()


def test_bits_are_asked_for_once(tmp_path):
    spec, _ = by_bitsandbytes(tmp_path, load_in_8bit=True)
    with pytest.raises(SubspanError, match="stored in few bits already"):
        Session(spec, "model.quantise.method=int8").plan()


def test_a_missing_library_is_said_before_weights_load(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("rewriter.packed.find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(SubspanError, match=r"model\.quantise\.method: it needs bitsandbytes: pip install"):
        Session(written(tmp_path, method="nf4")).plan()
