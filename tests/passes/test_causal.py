"""Attention without a mask, where the mask is causal and no more: the same numbers for tokens that are real."""

import pytest
import torch
import transformers as hf
from torch import nn

from rewriter import Rule, plan, rewrite, trace, tuned_parameters
from rewriter.graph.ops import SDPA
from rewriter.passes.base import Context
from rewriter.passes.fuse.causal import causal
from rewriter.plan.cost import saved_bytes
from rewriter.tasks import task_of
from rewriter.training.evaluation import objective
from tests.passes.test_recompute_gates import step
from tests.training.test_packing import LORA, SIZES, model_of

GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}
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


def rewritten(kind, options):
    task = task_of("causal-lm")
    if kind == "bloom":
        torch.manual_seed(0)
        config = hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
        model = hf.AutoModelForCausalLM.from_config(config).double().eval()
    else:
        model = model_of(kind, GPT2 if kind == "gpt2" else {**SIZES, **options})
    target = {"gpt2": "**.c_attn.weight", "bloom": "**.query_key_value.weight"}.get(kind, "**.{q,v}_proj.weight")
    traced = trace(model, task.inputs(model))
    out = rewrite(traced, plan(traced, [Rule.model_validate({"target": target, "apply": [LORA]})]))
    for p in tuned_parameters(out).values():
        nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    batch = task.example_batch(model, 3, 11)
    for name in ("input_ids", "labels"):
        batch[name] = torch.randint(3, 97, batch[name].shape, generator=torch.Generator().manual_seed(0))
    batch["attention_mask"][1, 7:] = 0
    batch["labels"][1, 6:] = -100
    return out.train(), task, batch


@pytest.mark.parametrize(("kind", "options", "longest", "count"), CASES.values(), ids=CASES)
def test_the_same_numbers_without_a_mask(kind, options, longest, count):
    model, task, batch = rewritten(kind, options)
    loss, grads, kept = step(model, task, batch)
    model.graphs["train"] = causal(model.graphs["train"], Context("train", longest=longest))
    model.graphs["train"].lint()
    model.recompile()
    nodes = model.graphs["train"].find_nodes(op="call_function", target=SDPA)
    assert sum(node.kwargs.get("is_causal", False) for node in nodes) == count
    again, others, less = step(model, task, batch)
    if count == 2:  # As a plan counts them.
        assert saved_bytes(model, batch, objective(task)) == pytest.approx(less, rel=0.02)
    assert (loss - again).abs() <= 1e-13 * loss.abs() and less <= kept
    for name, grad in grads.items():
        assert (grad - others[name]).abs().max() <= 1e-12 * grad.abs().max().clamp(min=1), name  # The order of sums.


def test_rows_that_are_padded_otherwise_keep_their_mask():
    model, _, _ = rewritten("llama", {})
    graph = causal(model.graphs["train"], Context("train"))
    assert not any(node.kwargs.get("is_causal") for node in graph.find_nodes(op="call_function", target=SDPA))
