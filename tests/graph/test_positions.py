"""What positions do to keys, found in the graph; PEFT's prefixes, which move the tokens, on models that rotate."""

import copy

import peft
import pytest
import torch
import transformers as hf

from rewriter import Inputs, SubspanError, trace
from rewriter.adapters.from_peft import tuned_from
from rewriter.adapters.to_peft import save_peft
from rewriter.graph.positions import tables, turn_of
from tests.architectures import SMALL, traced

WIDE = {**SMALL, "num_attention_heads": 4, "hidden_size": 32, "max_position_embeddings": 64, "pad_token_id": 0}
SCALED = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
ROTATED = {
    "llama": (hf.LlamaConfig, {"num_key_value_heads": 2}),
    "llama, linear": (hf.LlamaConfig, {"rope_parameters": SCALED}),
    "llama, llama3": (hf.LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama, yarn": (hf.LlamaConfig, {"rope_parameters": YARN}),
    "qwen2": (hf.Qwen2Config, {"num_key_value_heads": 2}),
    "norms of keys": (hf.Qwen3Config, {"num_key_value_heads": 2, "head_dim": 16}),
    "one linear for all, a part rotated": (hf.GPTNeoXConfig, {"rotary_pct": 0.5}),
    "pairs side by side": (hf.CohereConfig, {"num_key_value_heads": 2}),
    "a table": (hf.GPT2Config, {"n_embd": 32, "n_head": 4, "n_layer": 2}),
    "a table, counted by the mask": (hf.OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}
OTHERS = {
    "queries scaled by it": (
        hf.Ministral3Config,
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": None,
            "rope_parameters": YARN | {"original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.1},
        },
        "positions do not rotate",
    ),
    "biases": (hf.BloomConfig, {}, "positions are neither those of a table nor"),
    "a window": (hf.MistralConfig, {"num_key_value_heads": 2, "sliding_window": 16}, "its attention has a window"),
    "layers with a window": (
        hf.Qwen2Config,
        {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 16},
        "its attention has a window",
    ),
}


def built(kind, options):
    torch.manual_seed(0)
    own = {name: value for name, value in WIDE.items() if kind is not hf.GPT2Config or name == "vocab_size"}
    model = hf.AutoModelForCausalLM.from_config(kind(**own, **options)).float().eval()
    ids = torch.randint(1, 64, (3, 7))
    dynamic = {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask")}
    inputs = Inputs(kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, dynamic=dynamic)
    return model, inputs


MODULES = [f"model.layers.{i}.self_attn" for i in range(2)]


def turns(model, length):
    return {module: turn_of(model, module, length) for module in MODULES}


def test_it_is_the_rotation_of_the_paper():
    """RoFormer, eq. (15): pair i of a head's d turns by 10000^(-2i/d) a position; Llama's pairs are d/2 apart."""
    model, inputs = built(*ROTATED["llama"])
    found = turns(trace(model, inputs, ("eval",)), 5)
    angles = 5 * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    cos, sin = angles.cos().diag(), angles.sin().diag()
    expected = torch.cat([torch.cat([cos, sin], dim=1), torch.cat([-sin, cos], dim=1)])
    for turn in found.values():
        torch.testing.assert_close(turn, expected, rtol=0, atol=1e-6)  # cosines in float32


def test_half_types_round_nothing_of_it():
    """What they are in float32: cosines that are rounded would rotate by less."""
    model, inputs = built(*ROTATED["norms of keys"])
    found = turns(trace(model, inputs, ("eval",)), 5)
    for p in model.parameters():  # Angles are computed of a buffer, which loading leaves in float32.
        p.data = p.data.bfloat16()
    halves = turns(trace(model, inputs, ("eval",)), 5)
    for module, turn in found.items():
        torch.testing.assert_close(halves[module], turn, rtol=0, atol=1e-6)


def test_angles_that_depend_on_the_length_are_refused():
    model, inputs = built(*ROTATED["llama"])
    found = trace(model, inputs, ("eval",))
    found.config.rope_parameters["rope_type"] = "longrope"
    with pytest.raises(SubspanError, match=r"its rotation \(longrope\) depends on the length"):
        turns(found, 5)


@pytest.mark.parametrize("name", ROTATED)
def test_peft_s_rows_there_and_back(name, tmp_path):
    """float32: the logits of a padded batch, and of PEFT's folder once more."""
    model, inputs = built(*ROTATED[name])
    config = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    their = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for p in their.parameters():
        p.data += torch.randn_like(p) * p.requires_grad
    their.save_pretrained(tmp_path / "in")
    tuned, _ = tuned_from(trace(model, inputs, ("eval",)), tmp_path / "in")
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    batch = {"input_ids": torch.randint(1, 64, (3, 9)), "attention_mask": mask}
    with torch.no_grad():
        expected, base = their(**batch).logits[mask.bool()], model(**batch).logits[mask.bool()]
        torch.testing.assert_close(tuned.eval()(**batch).logits[mask.bool()], expected, rtol=1e-5, atol=1e-5)
        save_peft(tuned, tmp_path / "out", task_type="CAUSAL_LM")
        back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out").eval()
        torch.testing.assert_close(back(**batch).logits[mask.bool()], expected, rtol=1e-5, atol=1e-5)
    assert (expected - base).abs().max() > 1e-2


@pytest.mark.parametrize("name", OTHERS)
def test_rows_that_move_what_does_not_rotate_are_refused(name, tmp_path):
    kind, options, said = OTHERS[name]
    model, inputs = built(kind, options)
    config = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    with pytest.raises(SubspanError) as error:
        tuned_from(trace(model, inputs, ("eval",)), tmp_path)
    assert said in str(error.value)
    assert "move the tokens on by 5 positions" in str(error.value)


@pytest.mark.parametrize(
    ("arch", "found"),
    [
        ("gpt2", ["transformer.wpe.weight"]),
        ("roberta", ["roberta.embeddings.position_embeddings.weight"]),
        ("t5", []),
        ("llama", []),
    ],
)
def test_tables_of_distances_and_of_kinds_are_none_of_positions(arch, found):
    graph = traced(arch)[2].graphs["eval"]
    assert [node.args[0].target for node in tables(graph)] == found
