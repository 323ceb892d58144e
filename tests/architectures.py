"""Tiny random models of every architecture that the tests cover, with the weights that rules can target in each."""

from dataclasses import dataclass
from functools import cache

import torch
import transformers as hf

from rewriter import Inputs, TracedModel, example_inputs, trace
from rewriter.passes.base import Context
from rewriter.passes.manager import run
from rewriter.passes.pipelines import PASSES

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BERT = {**SMALL, "max_position_embeddings": 64}
LLAMA = {**BERT, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
NLU, LM = "sequence-classification", "causal-lm"


@dataclass(frozen=True)
class Architecture:
    """`linear` and `bias` are patterns of rules; `other` is a weight of an op that has no factored lowering."""

    config: type[hf.PreTrainedConfig]
    options: dict
    model: type[hf.PreTrainedModel]
    task: str
    linear: str
    bias: str
    other: str


ARCHITECTURES = {
    "bert": Architecture(
        hf.BertConfig, BERT, hf.BertForSequenceClassification, NLU,
        "bert.encoder.layer.*.{attention.self.{query,key,value},attention.output.dense,intermediate.dense,output.dense}.weight",
        "bert.encoder.layer.**.bias", "bert.embeddings.word_embeddings.weight",
    ),
    "roberta": Architecture(
        hf.RobertaConfig, BERT, hf.RobertaForSequenceClassification, NLU,
        "roberta.encoder.layer.*.{attention.self.{query,key,value},output.dense}.weight",
        "roberta.encoder.layer.**.bias", "roberta.embeddings.position_embeddings.weight",
    ),
    "deberta-v2": Architecture(
        hf.DebertaV2Config,
        {
            **BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
            "position_buckets": 8, "norm_rel_ebd": "layer_norm", "max_relative_positions": -1, "type_vocab_size": 0,
        },
        hf.DebertaV2ForSequenceClassification, NLU,
        "deberta.encoder.layer.*.{attention.self.{query_proj,key_proj,value_proj},intermediate.dense}.weight",
        "deberta.encoder.**.bias", "deberta.encoder.rel_embeddings.weight",
    ),
    "distilbert": Architecture(
        hf.DistilBertConfig,
        {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 64},
        hf.DistilBertForSequenceClassification, NLU,
        "distilbert.transformer.layer.*.{attention.{q_lin,k_lin,v_lin,out_lin},ffn.{lin1,lin2}}.weight",
        "distilbert.transformer.layer.**.bias", "distilbert.embeddings.word_embeddings.weight",
    ),
    "modernbert": Architecture(
        hf.ModernBertConfig, {**BERT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        hf.ModernBertForSequenceClassification, NLU,
        "model.layers.*.{attn.{Wqkv,Wo},mlp.{Wi,Wo}}.weight",
        "classifier.bias", "model.embeddings.tok_embeddings.weight",
    ),
    "gpt2": Architecture(
        hf.GPT2Config,
        {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
        hf.GPT2LMHeadModel, LM,
        "transformer.h.*.{attn.{c_attn,c_proj},mlp.{c_fc,c_proj}}.weight",
        "transformer.h.**.bias", "transformer.wte.weight",
    ),
    "llama": Architecture(
        hf.LlamaConfig, LLAMA, hf.LlamaForCausalLM, LM,
        "model.layers.*.{self_attn.{q,k,v,o}_proj,mlp.{gate,up,down}_proj}.weight",
        "", "model.embed_tokens.weight",
    ),
    "qwen3": Architecture(
        hf.Qwen3Config, LLAMA, hf.Qwen3ForCausalLM, LM,
        "model.layers.*.{self_attn.{q,k,v,o}_proj,mlp.{gate,up,down}_proj}.weight",
        "", "model.embed_tokens.weight",
    ),
    "mixtral": Architecture(
        hf.MixtralConfig, {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
        hf.MixtralForCausalLM, LM,
        "model.layers.*.self_attn.{q,k,v,o}_proj.weight",
        "", "model.layers.*.mlp.experts.{gate_up_proj,down_proj}",
    ),
    "vit": Architecture(
        hf.ViTConfig,
        {**SMALL, "image_size": 16, "patch_size": 8, "num_channels": 3, "num_labels": 2},
        hf.ViTForImageClassification, "image-classification",
        "vit.**.{q_proj,k_proj,v_proj,o_proj,fc1,fc2}.weight", "vit.**.{q_proj,fc1}.bias", "vit.embeddings.patch_embeddings.projection.weight",
    ),
    "t5": Architecture(
        hf.T5Config,
        {
            "vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2,
            "decoder_start_token_id": 0, "pad_token_id": 0,
        },
        hf.T5ForConditionalGeneration, "seq2seq-lm",
        "{encoder,decoder}.block.*.layer.*.**.{q,k,v,o,wi,wo}.weight",
        "", "shared.weight",
    ),
}  # fmt: skip
# RoBERTa and DistilBERT have BERT's ops and places, Qwen3 has Llama's.
UNLIKE = [name for name in ARCHITECTURES if name not in ("roberta", "distilbert", "qwen3")]


TYPES = {"mixtral": torch.float32}  # grouped_mm has no float64.


def build(name: str, dtype: torch.dtype | None = None, meta: bool = False) -> tuple[hf.PreTrainedModel, Inputs]:
    """A tiny random model in eval mode with its example inputs; every parameter drawn, none zero or one by default."""
    one, dtype = ARCHITECTURES[name], dtype or TYPES.get(name, torch.float64)
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        model = one.model._from_config(one.config(**one.options)).to(dtype).eval()
    if not meta:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.2 * noise.to(dtype)
    return model, example_inputs(model, one.task)


@cache
def raw(name: str) -> tuple[hf.PreTrainedModel, Inputs, TracedModel]:
    """A tiny model, its inputs and its graphs as they were traced, no pass run; one for all tests of a process."""
    model, inputs = build(name)
    return model, inputs, trace(model, inputs, without=[one.name for one in PASSES if "trace" in one.stages])


def cleaned(name: str, without: tuple[str, ...] = ()) -> TracedModel:
    """`raw`, with the passes that follow a trace, less some."""
    traced = raw(name)[2].clone()
    for mode, graph in traced.graphs.items():
        traced.graphs[mode] = run(graph, "trace", Context(mode), without)
    return traced


@cache
def traced(name: str) -> tuple[hf.PreTrainedModel, Inputs, TracedModel]:
    """A tiny model, its inputs, and what `trace` makes of it; one for all tests of a process."""
    model, inputs, _ = raw(name)
    graph = cleaned(name)
    graph.recompile()
    return model, inputs, graph


def inputs_of(name: str, inputs: Inputs, batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of a size, the last row padded."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, example in inputs.kwargs.items():
        if example.is_floating_point():
            out[key] = torch.randn((batch, *example.shape[1:]), generator=generator, dtype=example.dtype)
            continue
        size = (batch, max(2, length - 3) if key.startswith("decoder") else length)
        out[key] = (
            torch.ones(size, dtype=torch.long)
            if key == "attention_mask"
            else torch.randint(3, 64, size, generator=generator)
        )
        if key == "token_type_ids":
            out[key] = out[key] % 2
        if key == "attention_mask" and batch > 1:
            out[key][-1, length // 2 + 1 :] = 0
    return out
