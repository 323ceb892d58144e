"""Sublayers and attention, found in the graph: the same numbers as hooks on the model's own modules give."""

import math

import pytest
import torch
import transformers as hf
from torch import nn

from rewriter import Rule, example_inputs, plan, rewrite, trace, tuned_parameters
from rewriter.graph.sublayers import attentions
from tests.architectures import ARCHITECTURES, BERT, LLAMA, Architecture, build, inputs_of, traced

pytestmark = pytest.mark.xdist_group("architectures")

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
CAUSAL = {"vocab_size": 64, "hidden_size": 16, "bos_token_id": 1, "eos_token_id": 1}
# Of unusual build: layers that share their weights, attention beside the feed-forward, ALiBi in one op with the scores,
# capped scores.
UNUSUAL = {
    "albert": Architecture(hf.AlbertConfig, {**BERT, "embedding_size": 8}, hf.AlbertForSequenceClassification, "", "", "", ""),
    "falcon": Architecture(
        hf.FalconConfig, {**CAUSAL, "num_hidden_layers": 2, "num_attention_heads": 2}, hf.FalconForCausalLM, "", "", "", ""
    ),
    "bloom": Architecture(hf.BloomConfig, {**CAUSAL, "n_layer": 2, "n_head": 2}, hf.BloomForCausalLM, "", "", "", ""),
    "gemma2": Architecture(hf.Gemma2Config, LLAMA, hf.Gemma2ForCausalLM, "", "", "", ""),
}  # fmt: skip
# Layers, and in each: the last linear of attention, the first and the last of the feed-forward.
PARTS = {
    "bert": ("bert.encoder.layer.*", "attention.output.dense", "intermediate.dense", "output.dense"),
    "deberta-v2": ("deberta.encoder.layer.*", "attention.output.dense", "intermediate.dense", "output.dense"),
    "distilbert": ("distilbert.transformer.layer.*", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
    "gpt2": ("transformer.h.*", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "llama": ("model.layers.*", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"),
    "vit": ("vit.layers.*", "attention.o_proj", "mlp.fc1", "mlp.fc2"),
    "t5": ("encoder.block.*", "layer.0.SelfAttention.o", "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"),
    "albert": ("albert.encoder.albert_layer_groups.0.albert_layers.*", "attention.dense", "ffn", "ffn_output"),
    "falcon": ("transformer.h.*", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "bloom": ("transformer.h.*", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
}  # fmt: skip

ADAPTERS = {"hadapter": {"bottleneck": 4}, "padapter": {"bottleneck": 4}, "pa": {"rank": 4, "alpha": 6}}


def made(name):
    if name in ARCHITECTURES:
        return build(name)
    one = UNUSUAL[name]
    torch.manual_seed(0)
    model = one.model._from_config(one.config(**one.options)).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    kind = "sequence-classification" if name == "albert" else "causal-lm"
    return model, example_inputs(model, kind)


def graphed(name):
    if name in ARCHITECTURES:
        return traced(name)
    model, inputs = made(name)
    return model, inputs, trace(model, inputs, modes=("eval",))


def tuned(graph, target, step, scale=0.3):
    """The rewritten graph with every tuned tensor moved, and the tensors."""
    ours = rewrite(graph, plan(graph, [Rule(target=target, apply=[step])])).eval()
    leaves = tuned_parameters(ours)
    for value in leaves.values():
        value.data += scale * torch.randn_like(value)
    return ours, leaves


def logits(model, x):
    with torch.no_grad():
        return model(**x).logits


@pytest.mark.parametrize("name", PARTS)
def test_adapters_stand_where_hooks_would(name):
    model, inputs, graph = graphed(name)
    layers, attention, first, last = PARTS[name]
    x = inputs_of(name, inputs, 3, 9)
    for method, step in {
        "hadapter": {"bottleneck": 4},
        "padapter": {"bottleneck": 4},
        "pa": {"rank": 4, "alpha": 6},
    }.items():
        ours, leaves = tuned(graph, layers, {method: step})
        hooks, seen, shared = [], {}, {n.rpartition(".")[0] for n in leaves}
        for place in shared:
            layer, kind, _ = place.rsplit(".", 2)
            a, b, *biases = (leaves.get(f"{place}.{leaf}") for leaf in ("a", "b", "a_bias", "b_bias"))

            def adapt(module, args, y, a=a, b=b, biases=biases):
                return y + torch.relu(y @ a + biases[0]) @ b + biases[1]

            def beside(module, args, y, a=a, b=b, layer=layer, seen=seen):
                return y + 6 / 4 * torch.relu(seen[layer] @ a) @ b

            def see(module, args, layer=layer, seen=seen):
                seen[layer] = args[0]

            at = model.get_submodule(f"{layer}.{attention if kind == 'attention' else last}")
            hooks.append(at.register_forward_hook(beside if method == "pa" else adapt))
            hooks.append(model.get_submodule(f"{layer}.{first}").register_forward_pre_hook(see))
        count = len({layer.rsplit(".", 2)[0] for layer in shared})
        assert len(shared) == count * (2 if method == "hadapter" else 1) and count == (1 if name == "albert" else 2)
        expected = logits(model, x)
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(logits(ours, x), expected, **CLOSE)
        assert (expected - logits(model, x)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "vit", "t5", "albert"])
def test_a_prefix_is_the_same_in_both_forms_of_attention(name):
    outputs = []
    model, inputs = made(name)
    model.set_attn_implementation("eager")
    for form, graph in (("sdpa", graphed(name)[2]), ("eager", trace(model, inputs, modes=("eval",)))):
        layers = PARTS[name][0] if name != "t5" else "{encoder,decoder}.block.*"
        torch.manual_seed(0)
        ours, _ = tuned(graph, layers, {"prefix": {"length": 5}}, scale=1.0)
        assert all((one.product is None) == (form == "sdpa") for one in attentions(ours.base.graphs["eval"]))
        outputs.append(logits(ours, inputs_of(name, inputs, 3, 9)))
    # Llama's and ViT's explicit form takes its softmax in float32.
    close = {"rtol": 1e-5, "atol": 1e-5} if name in ("llama", "vit") else CLOSE
    torch.testing.assert_close(*outputs, **close)


@pytest.mark.parametrize("name", ["deberta-v2", "bloom", "gemma2"])
def test_a_prefix_of_zeros_beside_positions(name, monkeypatch):
    """Keys and values of zero: l columns of score 0 in the softmax, whatever positions add to the others."""
    model, inputs, graph = graphed(name)
    layers = {**PARTS, "gemma2": ("model.layers.*",)}[name][0]
    ours, leaves = tuned(graph, layers, {"prefix": {"length": 5}})
    for value in leaves.values():
        value.data.zero_()
    x = inputs_of(name, inputs, 3, 9)
    plain, softmax = logits(model, x), nn.functional.softmax

    def grown(scores, dim=-1, dtype=None):
        return softmax(torch.cat([scores.new_zeros(*scores.shape[:-1], 5), scores], dim), dim, dtype=dtype)[..., 5:]

    monkeypatch.setattr(nn.functional, "softmax", grown)
    expected = logits(model, x)
    assert (expected - plain).abs().max() > 1e-3
    # Bloom's and Gemma's softmax is in float32.
    close = CLOSE if name == "deberta-v2" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(logits(ours, x), expected, **close)


def test_a_prefix_that_repeats_a_token_doubles_its_weight(monkeypatch):
    """DeBERTa's explicit attention without positions: the prefix holds one token's own keys and values."""
    torch.manual_seed(0)
    options = {
        **ARCHITECTURES["deberta-v2"].options,
        "relative_attention": False,
        "pos_att_type": [],
        "num_hidden_layers": 1,
    }
    model = hf.DebertaV2ForSequenceClassification._from_config(hf.DebertaV2Config(**options)).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    inputs = example_inputs(model, "sequence-classification")
    ours, leaves = tuned(trace(model, inputs, modes=("eval",)), "deberta.encoder.layer.0", {"prefix": {"length": 1}})
    x, token = inputs_of("deberta-v2", inputs, 1, 9), 3
    attention = model.deberta.encoder.layer[0].attention.self
    for kind, linear in (("keys", attention.key_proj), ("values", attention.value_proj)):
        row = leaves[f"deberta.encoder.layer.0.attention.self.{kind}.prefix.p"]

        def keep(module, args, y, row=row):
            row.data.copy_(y[0, token : token + 1])

        linear.register_forward_hook(keep)
    plain, softmax = logits(model, x), nn.functional.softmax

    def doubled(scores, dim=-1):
        return softmax(scores + math.log(2) * torch.eye(9, dtype=scores.dtype)[token], dim)

    result = logits(ours, x)
    monkeypatch.setattr(nn.functional, "softmax", doubled)
    expected = logits(model, x)
    assert (expected - plain).abs().max() > 1e-4
    torch.testing.assert_close(result, expected, **CLOSE)
