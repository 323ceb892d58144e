"""Checkpoints in few bits, as those who write them store them: taken over with their own codes, or refused."""

import json
import re

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from rewriter import Session, SubspanError
from rewriter.algebra import Format, Quantised, held_bytes
from rewriter.quantise import LeftOut
from tests.tiny import make_tokenizer, project

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


def asked(folder, **section):
    """The spec over few/, whose config says how its weights are stored; a tokenizer and rows lie beside it."""
    if section:
        written = json.loads((folder / "few/config.json").read_text())
        (folder / "few/config.json").write_text(json.dumps(written | {"quantization_config": section}))
    make_tokenizer().save_pretrained(folder / "few")
    (folder / "data.txt").write_text("\n".join(["good film was the plot", "bad plot and a film"] * 12))
    (folder / "spec.yaml").write_text(TEXT.format(model=folder / "few", data=folder / "data.txt"))
    return folder / "spec.yaml"


def by_bitsandbytes(folder, config=None, auto="AutoModelForCausalLM", **how):
    """A spec over a checkpoint that transformers and bitsandbytes wrote, and that model as they load it."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    kind = getattr(hf, auto)
    kind.from_config(config or hf.LlamaConfig(**LLAMA)).save_pretrained(folder / "dense")
    load = lambda name, **more: kind.from_pretrained(folder / name, device_map="cpu", **more)  # noqa: E731
    load("dense", quantization_config=hf.BitsAndBytesConfig(**how)).save_pretrained(folder / "few")
    return asked(folder), load("few")


NESTED = {"bnb_4bit_use_double_quant": True}
# How a checkpoint is stored, and how far its model may be from bitsandbytes': its int8 rounds activations too.
STORED = [({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **more}, 0.0) for more in ({}, NESTED)]
STORED += [({"load_in_4bit": True, **NESTED}, 0.0), ({"load_in_8bit": True}, 0.01)]  # fp4 is its default.


@pytest.mark.parametrize(("how", "near"), STORED, ids=["nf4", "nf4 nested", "fp4 nested", "int8"])
def test_checkpoints_of_bitsandbytes_are_taken_over_with_their_codes(tmp_path, how, near):
    spec, theirs = by_bitsandbytes(tmp_path, **how)
    session = Session(spec)
    own, planned = session.prepare().pretrained.model, session.plan()
    assert planned.weight_bytes == sum(map(held_bytes, own.parameters())) < 0.5 * 4 * planned.total_parameters
    rows = torch.arange(12).view(2, 6)
    torch.testing.assert_close(own(rows).logits, theirs(rows).logits, rtol=0, atol=near)
    session.tune(tmp_path / "run")
    report = session.export()
    assert report["max_abs_diff"] < 1e-5 and report["requantised"]["method"] in ("nf4", "fp4", "int8")
    assert "quantization_config" not in json.loads((tmp_path / "run/merged/config.json").read_text())
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "run/merged").dtype == torch.float32


@pytest.mark.parametrize(("how", "near"), STORED, ids=["nf4", "nf4 nested", "fp4 nested", "int8"])
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
@pytest.mark.parametrize("how", [how for how, _ in STORED[1::2]], ids=["nf4 nested", "int8"])
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


def packed(numbers, bits):
    """Numbers from 0 on, the first in the lowest bits of int32, along the last dimension, which is filled up."""
    numbers = torch.nn.functional.pad(numbers, (0, -numbers.shape[-1] % (32 // bits)))
    some = numbers.long().unflatten(-1, (-1, 32 // bits)) << torch.arange(0, 32, bits)
    return some.sum(-1).to(torch.int32)


def by_compressed_tensors(folder, bits, group, symmetric, sizes=None, actorder=None, **more):
    """A spec over a checkpoint as compressed-tensors packs it, and the model that it means."""
    torch.manual_seed(0)
    model, held = hf.LlamaForCausalLM(hf.LlamaConfig(**(LLAMA | (sizes or {})))), {}
    half = 2 ** (bits - 1)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            weight, width = layer.weight.data, group or layer.weight.shape[1]
            ordered = torch.arange(weight.shape[1]) // width
            if actorder == "group":
                ordered = ordered[torch.randperm(len(ordered), generator=torch.Generator().manual_seed(0))]
                held[f"{name}.weight_g_idx"] = ordered.int()
            place = ordered.argsort(stable=True).argsort()
            values = weight[:, place.argsort()].unflatten(-1, (-1, width))
            low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
            scale = values.abs().amax(-1) / (half - 1) if symmetric else (high - low) / (2 * half - 1)
            zero = torch.full_like(scale, half) if symmetric else (-low / scale).round()
            codes = (values / scale[..., None] + zero[..., None]).round().clamp(0, 2 * half - 1)
            layer.weight.data = ((codes - zero[..., None]) * scale[..., None]).flatten(-2)[:, place]
            held[f"{name}.weight_packed"] = packed(codes.flatten(-2)[:, place], bits)
            held[f"{name}.weight_scale"] = scale
            held[f"{name}.weight_shape"] = torch.tensor(weight.shape)
            if not symmetric:
                held[f"{name}.weight_zero_point"] = packed(zero.t().contiguous(), bits).t().contiguous()
    model.save_pretrained(folder / "few")
    rest = {key: value for key, value in load_file(folder / "few/model.safetensors").items() if "_proj" not in key}
    save_file(rest | held, folder / "few/model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": bits, "type": "int", "strategy": "group" if group else "channel", "symmetric": symmetric}
    kind = {"targets": ["Linear"], "weights": weights | {"group_size": group, "actorder": actorder}} | more
    section = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": kind}}
    return asked(folder, **section), model.eval()


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "actorder"),
    [
        (4, 32, True, None), (4, 32, False, None), (4, None, True, "weight"), (4, 16, False, "group"),
        (8, 32, True, None), (8, None, True, None), (8, 16, True, "group"),
    ],
)  # fmt: skip
def test_checkpoints_of_compressed_tensors_are_taken_over_with_their_codes(tmp_path, bits, group, symmetric, actorder):
    spec, meant = by_compressed_tensors(tmp_path, bits, group, symmetric, actorder=actorder)
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


NARROW = {"hidden_size": 36, "intermediate_size": 44, "num_attention_heads": 3, "num_key_value_heads": 3}


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, None, True), (4, 4, False), (8, None, True)])
def test_rows_that_fill_no_whole_words(tmp_path, bits, group, symmetric):
    spec, meant = by_compressed_tensors(tmp_path, bits, group, symmetric, NARROW)
    own = Session(spec).prepare().pretrained.model
    for name, value in meant.named_parameters():
        found = own.get_parameter(name)
        torch.testing.assert_close(found.dense() if "_proj" in name else found, value)


def changed(folder, change, **section):
    """few/ with other tensors, and other keys in what its config says of them."""
    file, config = folder / "few/model.safetensors", folder / "few/config.json"
    save_file({name: one.contiguous() for name, one in change(load_file(file)).items()}, file, {"format": "pt"})
    written = json.loads(config.read_text())
    config.write_text(json.dumps(written | {"quantization_config": written["quantization_config"] | section}))


def without(end):
    return lambda held: {name: one for name, one in held.items() if not name.endswith(end)}


def also(end, value):
    return lambda held: held | {f"model.layers.0.self_attn.q_proj.{end}": value}


@pytest.mark.parametrize(
    ("symmetric", "change", "section", "said"),
    [
        (False, without("0.mlp.up_proj.weight_zero_point"), {}, "up_proj.weight of .*without zero points; its config"),
        (True, also("weight_zero_point", torch.zeros(8, 2, dtype=torch.int32)), {}, "with zero points; its config"),
        (
            True,
            also("weight_g_idx", torch.arange(64).int()),
            {},
            "in an order of inputs .*q_proj.weight_g_idx",
        ),
        (True, also("weight_scale", torch.ones(64, 4)), {}, "4 scales for 64 inputs; groups of 32 are read"),
        (True, without("0.mlp.up_proj.weight_scale"), {}, "up_proj.weight_scale of the base model is missing"),
        (True, dict, {"transform_config": {"config_groups": {"u": {}}}}, "stored with a transform_config, which"),
        (True, dict, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "stored with a sparsity_config, which"),
    ],
    ids=["no zeros", "zeros", "order", "groups", "no scale", "turned", "sparse"],
)
def test_files_that_their_config_contradicts_are_refused(tmp_path, symmetric, change, section, said):
    spec, _ = by_compressed_tensors(tmp_path, 4, 32, symmetric)
    changed(tmp_path, change, **section)
    with pytest.raises(SubspanError, match=rf"spec.yaml:2:.*{said}"):
        Session(spec).plan()


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
        ordered = torch.arange(n) // (group or n)
        ordered = ordered[torch.randperm(n, generator=generator)] if more.get("desc_act") else ordered
        codes = torch.randint(16, (n, m), generator=generator)
        zeros = torch.randint(16, (n // (group or n), m), generator=generator)
        scales = torch.rand(zeros.shape, generator=generator).half() / 100
        weight = (codes - zeros[ordered]) * scales.float()[ordered]
        layer.weight.data = weight.t().contiguous() if isinstance(layer, torch.nn.Linear) else weight
        if kind == "gptq":
            own = zeros if layout == "gptq_v2" else (zeros - 1) % 16
            parts = {"qweight": packed(codes.t(), 4).t(), "qzeros": packed(own, 4)}
            parts["g_idx"] = ordered.int()
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
    return asked(folder, **section), model.eval(), held


@pytest.mark.parametrize("config", [hf.LlamaConfig(**LLAMA), hf.GPT2Config(**GPT2)], ids=["llama", "gpt2"])
@pytest.mark.parametrize(
    ("kind", "group", "layout"),
    [
        ("gptq", 32, "gptq"), ("gptq", 32, None), ("gptq", None, "gptq_v2"), ("gptq, ordered", 16, "gptq"),
        ("awq", 32, "gemm"), ("awq", None, None),
    ],
)  # fmt: skip
def test_checkpoints_of_gptq_and_awq_are_taken_over_with_their_codes(tmp_path, kind, group, layout, config):
    kind, _, ordered = kind.partition(", ")
    spec, meant, held = by_rows(tmp_path, kind, config, group, layout, **({"desc_act": True} if ordered else {}))
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


def test_dense_weights_are_not_made_while_a_checkpoint_loads(tmp_path):
    _, meant, held = by_rows(tmp_path, "gptq", hf.LlamaConfig(**LLAMA), 32, "gptq")
    config = hf.AutoConfig.from_pretrained(tmp_path / "few")
    del config.quantization_config
    forms = {f"{name.removesuffix('.qweight')}.weight": Format("int4", 32) for name in held if "qweight" in name}
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "few", config=config, quantization_config=LeftOut(forms))
    for name, value in model.named_parameters():
        assert value.is_meta == (name in forms) and value.shape == meant.get_parameter(name).shape
    assert not model.is_quantized and not hasattr(model.config, "quantization_config")


def test_a_checkpoint_of_gptq_is_tuned_and_merged(tmp_path):
    spec, *_ = by_rows(tmp_path, "gptq", hf.LlamaConfig(**LLAMA), 32, "gptq", desc_act=True)
    session = Session(spec)
    session.tune(tmp_path / "run")
    report = session.export()
    assert report["max_abs_diff"] < 1e-5 and report["requantised"]["method"] == "int4"


@pytest.mark.parametrize(
    ("kind", "change", "section", "said"),
    [
        ("gptq", also("qzeros", torch.zeros(1, 8, dtype=torch.int32)), {}, "q_proj of .* not in 4 bits as gptq packs"),
        ("gptq", also("qweight", torch.zeros(8, 64, dtype=torch.int8)), {}, "q_proj.qweight of .* 8 x 64 of I8, which"),
        ("gptq", also("scales", torch.ones(2, 64, dtype=torch.int32)), {}, "q_proj.scales of .* 2 x 64 of I32, which"),
        ("gptq", dict, {"group_size": 16}, "scales for .* inputs; groups of 16 are read"),
        ("gptq", dict, {"bits": "4"}, "by gptq in '4' bits"),
        ("gptq", dict, {"quant_method": "awq", "checkpoint_format": "gemm"}, "not in 4 bits as awq packs them"),
        ("awq", dict, {"desc_act": True}, ".g_idx of the base model, the order of desc_act, is missing"),
        ("gptq", without("q_proj.g_idx"), {"desc_act": True}, "q_proj.g_idx of the base model.* is missing"),
        ("gptq", also("g_idx", torch.zeros(64).int()), {}, "q_proj.g_idx .* its 64 inputs into groups of 32"),
        ("awq", without("q_proj.scales"), {}, "q_proj.scales of the base model is missing"),
    ],
    ids=["zeros", "type", "scales", "groups", "text", "other", "awq's order", "no order", "order", "missing"],
)
def test_files_of_rows_that_their_config_contradicts_are_refused(tmp_path, kind, change, section, said):
    spec, *_ = by_rows(tmp_path, kind, hf.LlamaConfig(**LLAMA), 32, "gptq" if kind == "gptq" else "gemm")
    changed(tmp_path, change, **section)
    with pytest.raises(SubspanError, match=rf"spec.yaml:2:.*{said}"):
        Session(spec).plan()


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors", "fp8"])
def test_a_weight_s_parts_may_lie_in_several_files(tmp_path, kind):
    if kind == "gptq":
        spec, meant, _ = by_rows(tmp_path, kind, hf.LlamaConfig(**LLAMA), 32, "gptq")
    elif kind == "fp8":
        spec, meant, _ = by_floats(tmp_path, BLOCKS, "_scale_inv", (32, 16))
    else:
        spec, meant = by_compressed_tensors(tmp_path, 4, 32, False)
    file = tmp_path / "few/model.safetensors"
    held = load_file(file)
    index = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(sorted(held))}
    for one in set(index.values()):
        save_file({name: held[name] for name in held if index[name] == one}, file.with_name(one), {"format": "pt"})
    file.with_suffix(".safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    file.unlink()
    own = Session(spec).prepare().pretrained.model
    for name, value in meant.named_parameters():
        found = own.get_parameter(name)
        torch.testing.assert_close(found.dense() if isinstance(found, Quantised) else found, value)


def by_floats(folder, section, scale, block=None):
    """A spec over a checkpoint in floats of 8 bits, and the model that it means.

    Args:
        scale: the end of the scales' name.
        block: rows and columns that share one; None: a row, 0: all.
    """
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)).bfloat16()
    held = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            weight = layer.weight.data.float()
            rows, columns = block or ((1, weight.shape[1]) if block is None else weight.shape)
            parts = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
            scales = parts.abs().amax((1, 3)) / 448
            codes = (parts / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            layer.weight.data = (codes.float() * scales[:, None, :, None]).reshape(weight.shape).bfloat16()
            held[f"{name}.weight"] = codes.reshape(weight.shape)
            held[f"{name}.weight{scale}"] = scales if block != 0 else scales.reshape(1)
    model.save_pretrained(folder / "few")
    save_file(load_file(folder / "few/model.safetensors") | held, folder / "few/model.safetensors", {"format": "pt"})
    return asked(folder, **section), model.eval(), held


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 16]}
DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def floats(strategy, **more):
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True} | more
    group = {"targets": ["Linear"], "weights": weights, "input_activations": DYNAMIC}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("section", "scale", "block"),
    [
        (BLOCKS, "_scale_inv", (32, 16)),
        (floats("channel"), "_scale", None),
        (floats("tensor"), "_scale", 0),
        (floats("block", block_structure=[32, 16]), "_scale", (32, 16)),
    ],
    ids=["fp8", "channel", "tensor", "block"],
)
def test_checkpoints_in_floats_of_8_bits_are_taken_over_with_their_codes(tmp_path, section, scale, block):
    spec, meant, held = by_floats(tmp_path, section, scale, block)
    session = Session(spec)
    own, planned = session.prepare().pretrained.model, session.plan()
    assert planned.weight_bytes == sum(map(held_bytes, own.parameters())) < 0.75 * 2 * planned.total_parameters
    for name, value in meant.named_parameters():
        found = own.get_parameter(name)
        assert isinstance(found, Quantised) == (name in held)
        assert torch.equal(found.dense() if name in held else found, value)
    if "weight_block_size" in section:
        config = hf.FineGrainedFP8Config(weight_block_size=[32, 16], dequantize=True)
        theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "few", quantization_config=config)
        for name, value in theirs.named_parameters():
            torch.testing.assert_close(value, meant.get_parameter(name), rtol=0, atol=0)
        session.tune(tmp_path / "run")
        assert session.export()["requantised"]["method"] == "fp8"


@pytest.mark.parametrize(
    ("section", "changed", "said"),
    [
        (BLOCKS, lambda held: {k: v for k, v in held.items() if "q_proj" not in k or "scale" not in k}, "without a"),
        (BLOCKS, lambda held: {k: v.to(torch.float8_e5m2) for k, v in held.items()}, "of F8_E5M2, which is not what"),
        (
            BLOCKS,
            lambda held: {k: v.int() if "scale" in k else v for k, v in held.items()},
            "of I32, which is not what",
        ),
        (BLOCKS, lambda held: held | {k.removesuffix("_inv"): v.clone() for k, v in held.items()}, "which one counts"),
        (BLOCKS | {"weight_block_size": [64, 16]}, dict, "are not so many blocks of 64 x 16"),
        (BLOCKS | {"weight_block_size": ["32", "16"]}, dict, "does not say how many rows and columns"),
        ({"quant_method": "fp8"}, dict, "does not say how many rows and columns"),
    ],
    ids=["no scale", "e5m2", "whole scales", "both", "blocks", "texts", "no blocks"],
)
def test_other_floats_of_8_bits_are_refused_before_weights_load(tmp_path, section, changed, said):
    spec, _, held = by_floats(tmp_path, section, "_scale_inv", (32, 16))
    file = tmp_path / "few/model.safetensors"
    rest = {name: value for name, value in load_file(file).items() if name not in held}
    save_file(rest | changed(held), file, {"format": "pt"})
    with pytest.raises(SubspanError, match=rf"spec.yaml:2:.*{said}"):
        Session(spec).plan()


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("gptq", {"bits": 3}, "stored by gptq in 3 bits as gptq; only 4 bits as gptq or gptq_v2 is read"),
        ("gptq", {"is_marlin_format": True}, "in 4 bits as marlin"),
        ("awq", {"checkpoint_format": None, "version": "GEMV"}, "by awq in 4 bits as gemv; only 4 bits as gemm is"),
    ],
)
def test_other_checkpoints_of_gptq_and_awq_are_refused_before_weights_load(tmp_path, kind, more, said):
    spec, *_ = by_rows(tmp_path, kind, hf.LlamaConfig(**LLAMA), 32, "gptq" if kind == "gptq" else "gemm", **more)
    with pytest.raises(SubspanError, match=rf"spec.yaml:2:.*{said}"):
        Session(spec).plan()


def test_other_checkpoints_in_few_bits_are_refused_before_weights_load(tmp_path):
    spec, _ = by_bitsandbytes(tmp_path, load_in_4bit=True)
    config = tmp_path / "few/config.json"
    config.write_text(config.read_text().replace('"bitsandbytes"', '"hqq"'))
    with pytest.raises(SubspanError, match=r"is quantised \(hqq\), which is not supported"):
        Session(spec).plan()


def test_bits_are_asked_for_once(tmp_path):
    spec, _ = by_bitsandbytes(tmp_path, load_in_8bit=True)
    with pytest.raises(SubspanError, match="stored in few bits already"):
        Session(spec, "model.quantise.method=int8").plan()
