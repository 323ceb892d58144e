"""Gated units keep their inputs alone: the same outputs and gradients, and an activation less for each of them."""

import pytest
import torch
import transformers as hf
from torch import nn

from rewriter import Rule, plan, rewrite, trace, tuned_parameters
from rewriter.graph.gated import gated
from rewriter.passes.base import Context
from rewriter.passes.fuse.recompute_gates import recompute_gates
from rewriter.tasks import task_of
from tests.training.test_packing import LORA, SIZES, model_of

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 97}
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
CASES = {
    "llama": ("**.{up,gate,down,q,v}_proj.weight", 2),
    "gemma2": ("**.{up,gate,down}_proj.weight", 2),
    "phi3": ("**.{gate_up,down}_proj.weight", 2),
    "gpt2": ("**.c_attn.weight", 0),
}


def rewritten(kind):
    task, target = task_of("causal-lm"), CASES.get(kind, ("**.{wi_0,wi_1,wo}.weight", 4))[0]
    if kind == "t5":
        task, config = (
            task_of("seq2seq-lm"),
            hf.T5Config(**T5, feed_forward_proj="gated-silu", decoder_start_token_id=0),
        )
        torch.manual_seed(0)
        model = hf.AutoModelForSeq2SeqLM.from_config(config).double()
    else:
        sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4} if kind == "gpt2" else SIZES
        model = model_of(kind, sizes)
    traced = trace(model, task.inputs(model))
    out = rewrite(traced, plan(traced, [Rule.model_validate({"target": target, "apply": [LORA]})]))
    for p in tuned_parameters(out).values():
        nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    batch = task.example_batch(model, 3, 11)
    for name in batch:
        if name.endswith("ids") or name == "labels":
            batch[name] = torch.randint(3, 97, batch[name].shape, generator=torch.Generator().manual_seed(0))
    return out.train(), task, batch


def step(model, task, batch):
    """Loss, gradients, and the bytes that are kept for the backward."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task.loss(model(**{name: batch[name] for name in model.input_names}), batch)
    loss.backward()
    found = {name: p.grad for name, p in tuned_parameters(model).items()}
    model.zero_grad()
    return loss.detach(), found, sum(size for size, _ in kept.values())


@pytest.mark.parametrize(("kind", "units"), [*((kind, units) for kind, (_, units) in CASES.items()), ("t5", 4)])
def test_the_same_numbers_and_an_activation_less(kind, units):
    model, task, batch = rewritten(kind)
    loss, grads, kept = step(model, task, batch)
    model.graphs["train"] = recompute_gates(model.graphs["train"], Context("train"))
    model.graphs["train"].lint()
    model.recompile()
    calls = [node for node in model.graphs["train"].nodes if getattr(node.target, "__name__", "") == "gated_unit"]
    assert len(calls) == units
    again, others, less = step(model, task, batch)
    assert torch.equal(loss, again)
    for name, grad in grads.items():
        assert (grad - others[name]).abs().max() <= 1e-14 * grad.abs().max().clamp(min=1), name  # The order of factors.
    sizes = [node.meta["val"].shape[-1] for node in calls]
    assert kept - less == sum(3 * 11 * size * 8 for size in sizes)


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
