"""Heads that share keys and values read them as they are: the same numbers, and no copies that are kept."""

import pytest
import torch
from torch import nn

from rewriter import Inputs, trace
from rewriter.graph.ops import SDPA
from rewriter.passes.base import Context
from rewriter.passes.fuse.group_heads import group_heads
from rewriter.tasks import task_of
from tests.passes.steps import before_and_after, decoder, padded, rewritten, same_gradients

pytestmark = pytest.mark.xdist_group("decoders")

# Key heads of four query heads, and attentions that read keys and values once for all of them.
CASES = {"llama": 2, "mistral": 2, "qwen3": 2, "phi3": 2, "gpt2": 0}


def made(kind):
    task = task_of("causal-lm")
    target = "**.c_attn.weight" if kind == "gpt2" else "**.{down,o}_proj.weight"
    model, batch = rewritten(decoder(kind), task, target)
    return model, padded(batch), task


def grouped(graph):
    nodes = graph.find_nodes(op="call_function", target=SDPA)
    return [node for node in nodes if node.kwargs.get("enable_gqa")]


@pytest.mark.parametrize(("kind", "count"), CASES.items())
def test_the_same_numbers_without_the_copies(kind, count):
    model, batch, task = made(kind)
    before, after = before_and_after(group_heads, Context("train"), model, task, batch)
    assert len(grouped(model.graphs["train"])) == count
    assert (before.loss - after.loss).abs() <= 1e-14 * before.loss.abs()
    same_gradients(before, after, 1e-12)
    # The first layer's attention has no gradients to keep anything for; of the second one's, in float64, half of the
    # keys and half of the values are gone: as many as there are queries.
    _, heads, _, width = grouped(model.graphs["train"])[-1].args[0].meta["val"].shape if count else (0, 0, 0, 0)
    assert before.kept - after.kept == 8 * 3 * 11 * heads * width


class Bare(nn.Module):
    """Attention of heads without a batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(self.linear(x), x, x)


def test_heads_without_a_batch_stay_as_they_are():
    graph = trace(Bare(), Inputs(args=(torch.zeros(2, 5, 8),))).graphs["train"]
    assert not grouped(group_heads(graph, Context("train")))


def test_a_gpu_repeats_them():
    """Some of PyTorch's fused kernels take no grouped heads there."""
    model, _, _ = made("llama")
    assert not grouped(group_heads(model.graphs["train"], Context("train", device="cuda")))
