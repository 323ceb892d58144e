"""Heads that share keys and values read them as they are: the same numbers, and no copies that are kept."""

import pytest
import torch
from torch import nn

from rewriter import Rule, plan, rewrite, trace, tuned_parameters
from rewriter.graph.ops import SDPA
from rewriter.passes.base import Context
from rewriter.passes.fuse.group_heads import group_heads
from rewriter.tasks import task_of
from tests.passes.test_recompute_gates import step
from tests.training.test_packing import LORA, SIZES, model_of

# Key heads of four query heads, and attentions that read keys and values once for all of them.
CASES = {"llama": 2, "mistral": 2, "qwen3": 2, "phi3": 2, "gpt2": 0}


def rewritten(kind):
    task = task_of("causal-lm")
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4} if kind == "gpt2" else SIZES
    model = model_of(kind, sizes)
    traced = trace(model, task.inputs(model))
    target = "**.c_attn.weight" if kind == "gpt2" else "**.{down,o}_proj.weight"
    out = rewrite(traced, plan(traced, [Rule.model_validate({"target": target, "apply": [LORA]})]))
    for p in tuned_parameters(out).values():
        nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    batch = task.example_batch(model, 3, 11)
    for name in ("input_ids", "labels"):
        batch[name] = torch.randint(3, 97, batch[name].shape, generator=torch.Generator().manual_seed(0))
    batch["attention_mask"][1, 7:] = 0
    batch["labels"][1, 6:] = -100
    return out.train(), task, batch


def grouped(graph):
    nodes = graph.find_nodes(op="call_function", target=SDPA)
    return [node for node in nodes if node.kwargs.get("enable_gqa")]


@pytest.mark.parametrize(("kind", "count"), CASES.items())
def test_the_same_numbers_without_the_copies(kind, count):
    model, task, batch = rewritten(kind)
    loss, grads, kept = step(model, task, batch)
    model.graphs["train"] = group_heads(model.graphs["train"], Context("train"))
    model.graphs["train"].lint()
    model.recompile()
    assert len(grouped(model.graphs["train"])) == count
    again, others, less = step(model, task, batch)
    assert (loss - again).abs() <= 1e-14 * loss.abs()
    for name, grad in grads.items():
        assert (grad - others[name]).abs().max() <= 1e-12 * grad.abs().max().clamp(min=1), name  # The order of sums.
    # The first layer's attention has no gradients to keep anything for; of the second one's, in float64, half of the
    # keys and half of the values are gone: as many as there are queries.
    _, heads, _, width = grouped(model.graphs["train"])[-1].args[0].meta["val"].shape if count else (0, 0, 0, 0)
    assert kept - less == 8 * 3 * 11 * heads * width


def test_a_gpu_repeats_them():
    """Some of PyTorch's fused kernels take no grouped heads there."""
    model, _, _ = rewritten("llama")
    assert not grouped(group_heads(model.graphs["train"], Context("train", device="cuda")))
