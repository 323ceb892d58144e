"""Attention ops of traced graphs, and those that are of no form that is known."""

import pytest
import torch
import transformers as hf

from rewriter import Inputs, trace
from rewriter.graph.sublayers import known_attentions
from tests.cases.tiny import BERT, LLAMA

SINKS = {
    **LLAMA,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "layer_types": ["full_attention"] * 2,
    "num_hidden_layers": 2,
}
MODELS = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**BERT)), 2),
    "explicit": (lambda: hf.BertModel._from_config(hf.BertConfig(**BERT), attn_implementation="eager"), 2),
    "sinks": (lambda: hf.GptOssModel(hf.GptOssConfig(**SINKS)), None),
    "none": (lambda: hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])), 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_attentions_are_counted_where_all_are_known(name):
    made, expected = MODELS[name]
    ids = torch.ones(3, 5, dtype=torch.long)
    inputs = Inputs(kwargs={"input_ids": ids}, dynamic={"input_ids": {1: "sequence"}})
    if name == "none":
        inputs = Inputs(kwargs={"pixel_values": torch.zeros(2, 3, 32, 32)})
    assert known_attentions(trace(made().eval(), inputs, ("eval",)).graphs["eval"]) == expected
