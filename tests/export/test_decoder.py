"""Decoders with a cache: what is decoded token by token is what `generate` says."""

import json

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
import transformers as hf

from rewriter import Session
from rewriter import greedy as decoding
from rewriter.export import variants
from rewriter.export.ship import load_tuned
from rewriter.export.writing import of_file
from tests.cases.tiny import GPT2, LLAMA, task_spec

pytestmark = pytest.mark.slow

SEVEN = "**.{self_attn.{q,k,v,o}_proj,mlp.{gate,up,down}_proj}.weight"
GEMMA = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
DECODERS = {
    "llama": (lambda: hf.LlamaConfig(**{**LLAMA, "num_attention_heads": 4}), SEVEN),
    "mistral": (lambda: hf.MistralConfig(**{**LLAMA, "sliding_window": 6}), "**.{q,v}_proj.weight"),
    "gemma3": (lambda: hf.Gemma3TextConfig(**{**LLAMA, **GEMMA, "pad_token_id": 0}), "**.{q,v}_proj.weight"),
    "gpt2": (lambda: hf.GPT2Config(**GPT2), "**.c_attn.weight"),
    "bloom": (lambda: hf.BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=50), "**.query_key_value.weight"),
    "mixtral": (lambda: hf.MixtralConfig(**LLAMA, num_local_experts=2), "**.{q,v}_proj.weight"),
}
NEW = 24
NO_RULE = ("bloom",)  # Its positions are biases of the scores, which no rule of onnxscript has.


def greedy(file, ids, mask):
    """(rows, NEW) the tokens that follow, by a session that keeps keys and values."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    rows = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    return np.array([said.ids for said in decoding.greedy(*of_file(session)(rows), (), NEW)])


def exported(folder, name):
    config, target = DECODERS[name]
    spec = task_spec(
        folder, config(), "CausalLM", "causal-lm", target, train={"max_steps": 3, "batch_size": 4, "learning_rate": 0.1}
    )
    session = Session(spec)
    session.tune(folder / "run")
    session.export()
    return folder / "run", json.loads((folder / "run" / "export.json").read_text())


IDS = {"llama": "37-llama", "mistral": "41-mistral", "gemma3": "41-gemma3", "bloom": "42-bloom"}


@pytest.mark.parametrize("name", DECODERS, ids=lambda name: IDS.get(name, name))
def test_greedy_tokens_are_those_of_generate(tmp_path, name):
    run, found = exported(tmp_path, name)
    assert found["cache"] == {"holds": True, "reason": None}
    model = hf.AutoModelForCausalLM.from_pretrained(run / "merged")
    lengths = (3, 9, 6, 1)
    ids, mask = torch.zeros(4, 9, dtype=torch.long), torch.zeros(4, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(4, 16, (length,), generator=torch.Generator().manual_seed(row))
        mask[row, -length:] = 1
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, attention_mask=mask, **options)[:, 9:]
    assert len(expected.unique()) > 2
    np.testing.assert_array_equal(greedy(run / "onnx" / "model.onnx", ids, mask), expected.numpy())
    if name == "llama":
        check_names(run)
    variants.fused(run / "onnx" / "model.onnx", fused := tmp_path / "fused.onnx")
    nodes = onnx_ir.load(run / "onnx" / "model.onnx").graph
    if name == "gpt2":  # No weight in 8 or 4 bits is made of a Gemm.
        assert "Gemm" not in {node.op_type for node in nodes}
    assert variants.attention_nodes(fused) == (0 if name in NO_RULE else model.config.num_hidden_layers)
    np.testing.assert_array_equal(greedy(fused, ids, mask), expected.numpy())


def check_names(run):
    """Names and sizes are those of its consumers."""
    session = onnxruntime.InferenceSession(str(run / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    read = {value.name: value.shape for value in session.get_inputs()}
    assert list(read)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert read["attention_mask"] == ["batch", "total_sequence"]
    assert read["past_key_values.1.value"] == ["batch", 2, "past_sequence", 8]
    assert session.get_modelmeta().custom_metadata_map["longest"] == "64"
    given = {value.name: value.shape for value in session.get_outputs()}
    assert given["logits"] == ["batch", "sequence", 50]
    assert given["present.0.key"] == ["batch", 2, "past_sequence + sequence", 8]


STAYS = [
    ("mistral", "model.layers.*", {"prefix": {"length": 2}}),
    ("gpt2", "transformer.h.*", {"prefix": {"length": 2, "moves": True}}),
    ("gpt2", "transformer.wte", {"prompt": {"length": 3}}),
    ("gpt2", "transformer.h.*", {"hadapter": {"bottleneck": 4}}),
]


@pytest.mark.parametrize(("base", "target", "step_"), STAYS)
def test_what_can_t_merge_decodes_as_the_tuned_model(tmp_path, base, target, step_):
    """Rows before the tokens are keys and values that are there from the start."""
    train = {"max_steps": 3, "batch_size": 4, "learning_rate": 0.1}
    spec = task_spec(tmp_path, DECODERS[base][0](), "CausalLM", "causal-lm", target, train=train)
    rule = spec.rules[0].model_copy(update={"apply": [step_]})
    session = Session(type(spec).model_validate({**spec.model_dump(by_alias=True), "rules": [rule.model_dump()]}))
    session.tune(tmp_path / "run")
    session.export()
    found = json.loads((tmp_path / "run" / "export.json").read_text())
    assert found["cache"] == {"holds": True, "reason": None}
    tuned = load_tuned(session.spec, tmp_path / "run")[-1]
    ids = torch.randint(4, 16, (2, 5), generator=torch.Generator().manual_seed(0))
    expected = ids
    for _ in range(NEW):
        with torch.no_grad():
            logits = tuned(input_ids=expected, attention_mask=torch.ones_like(expected))["logits"]
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    decoded = greedy(tmp_path / "run" / "onnx" / "model.onnx", ids, torch.ones_like(ids))
    np.testing.assert_array_equal(decoded, expected[:, 5:].numpy())
