"""Gated units keep their inputs alone: the same outputs and gradients, and an activation less for each of them."""

import pytest
import torch
import transformers as hf

from rewriter.graph.gated import gated
from rewriter.passes.base import Context
from rewriter.passes.fuse.recompute_gates import recompute_gates
from rewriter.tasks import task_of
from tests.passes.steps import before_and_after, decoder, rewritten, same_gradients

pytestmark = pytest.mark.xdist_group("decoders")

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 97}
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
CASES = {
    "llama": ("**.{up,gate,down,q,v}_proj.weight", 2),
    "gemma2": ("**.{up,gate,down}_proj.weight", 2),
    "phi3": ("**.{gate_up,down}_proj.weight", 2),
    "gpt2": ("**.c_attn.weight", 0),
}


def made(kind):
    if kind == "t5":
        task, config = (
            task_of("seq2seq-lm"),
            hf.T5Config(**T5, feed_forward_proj="gated-silu", decoder_start_token_id=0),
        )
        torch.manual_seed(0)
        model = hf.AutoModelForSeq2SeqLM.from_config(config).double()
        return *rewritten(model, task, "**.{wi_0,wi_1,wo}.weight"), task
    task = task_of("causal-lm")
    return *rewritten(decoder(kind), task, CASES[kind][0]), task


@pytest.mark.parametrize(("kind", "units"), [*((kind, units) for kind, (_, units) in CASES.items()), ("t5", 4)])
def test_the_same_numbers_and_an_activation_less(kind, units):
    model, batch, task = made(kind)
    before, after = before_and_after(recompute_gates, Context("train"), model, task, batch)
    calls = [node for node in model.graphs["train"].nodes if getattr(node.target, "__name__", "") == "gated_unit"]
    assert len(calls) == units
    assert torch.equal(before.loss, after.loss)
    same_gradients(before, after, 1e-14)
    sizes = [node.meta["val"].shape[-1] for node in calls]
    assert before.kept - after.kept == sum(3 * 11 * size * 8 for size in sizes)


@pytest.mark.parametrize("activation", [torch.ops.aten.silu.default, torch.ops.aten.gelu.default])
def test_a_gated_unit_is_what_it_says(activation):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 7, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    assert torch.equal(gated(activation, x, y), activation(x) * y)
    assert torch.autograd.gradcheck(lambda x, y: gated(activation, x, y), (x, y))
    out = gated(activation, x, y.detach())
    assert torch.allclose(
        torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad((activation(x) * y.detach()).sum(), x)[0], atol=1e-14
    )
