"""Attention without a mask, where the mask is causal and no more: the same numbers for tokens that are real."""

import pytest
import torch
import transformers as hf

from rewriter.graph.ops import SDPA
from rewriter.passes.base import Context
from rewriter.passes.fuse.causal import causal
from rewriter.plan.cost import saved_bytes
from rewriter.tasks import task_of
from rewriter.training.evaluation import objective
from tests.passes.steps import before_and_after, decoder, padded, rewritten, same_gradients

pytestmark = pytest.mark.xdist_group("decoders")

# Kind, options, longest row, attentions without a mask of two.
CASES = {
    "llama": ("llama", {}, 32, 2),
    "gpt2": ("gpt2", {}, 32, 2),
    "qwen3": ("qwen3", {}, 32, 2),
    "a window that is long enough": ("mistral", {"sliding_window": 32}, 32, 2),
    "a window": ("mistral", {"sliding_window": 8}, 32, 0),
    "a window of more than half": ("mistral", {"sliding_window": 20}, 32, 0),
    "every second window": ("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, 32, 1),
    "alibi": ("bloom", {}, 32, 0),
}  # fmt: skip


def made(kind, options):
    task = task_of("causal-lm")
    if kind == "bloom":
        torch.manual_seed(0)
        config = hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
        model = hf.AutoModelForCausalLM.from_config(config).double().eval()
    else:
        model = decoder(kind, **options)
    target = {"gpt2": "**.c_attn.weight", "bloom": "**.query_key_value.weight"}.get(kind, "**.{q,v}_proj.weight")
    model, batch = rewritten(model, task, target)
    return model, padded(batch), task


@pytest.mark.parametrize(("kind", "options", "longest", "count"), CASES.values(), ids=CASES)
def test_the_same_numbers_without_a_mask(kind, options, longest, count):
    model, batch, task = made(kind, options)
    before, after = before_and_after(causal, Context("train", longest=longest), model, task, batch)
    nodes = model.graphs["train"].find_nodes(op="call_function", target=SDPA)
    assert sum(node.kwargs.get("is_causal", False) for node in nodes) == count
    if count == 2:  # As a plan counts them.
        assert saved_bytes(model, batch, objective(task)) == pytest.approx(after.kept, rel=0.02)
    assert (before.loss - after.loss).abs() <= 1e-13 * before.loss.abs() and after.kept <= before.kept
    same_gradients(before, after, 1e-12)


def test_rows_that_are_padded_otherwise_keep_their_mask():
    model, _, _ = made("llama", {})
    graph = causal(model.graphs["train"], Context("train"))
    assert not any(node.kwargs.get("is_causal") for node in graph.find_nodes(op="call_function", target=SDPA))
