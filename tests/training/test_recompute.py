"""Layers that are computed again in the backward: the same numbers, less memory."""

import pytest
import torch
from torch import nn

from rewriter import Inputs, Rule, SpecError, plan, rewrite, trace, tuned_parameters
from rewriter.plan.cost import saved_bytes, step_cost
from rewriter.training.optimisers import OPTIMISERS
from rewriter.training.recompute import by_layer, fewest
from tests.plan.test_cost import rewritten

BERT = "bert.encoder.layer.*.**.{query,key,value,dense}.weight"
CASES = [
    ("bert", BERT, {"lora": {"rank": 4, "dropout": 0.1}}),
    ("bert-dropout", BERT, {"dora": {"rank": 4}}),
    ("bert", "bert.encoder.layer.*", {"prefix": {"length": 4}}),
    ("llama", "model.layers.*.{self_attn,mlp}.*.weight", {"lora": {"rank": 4}}),
]


def gradients(model, loss, batch):
    torch.manual_seed(1)
    value = loss(model.train(), batch)
    (value + sum(model.penalties.values())).backward()
    found = {name: p.grad.clone() for name, p in tuned_parameters(model).items()}
    model.zero_grad()
    return value.detach(), found


def saved(model, loss, batch):
    """Bytes that live on after a forward, parameters and inputs apart."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *batch.values())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model.train(), batch)
    return sum(size for place, size in kept.items() if place not in known)


@pytest.mark.parametrize(("name", "target", "step"), CASES, ids=[f"{c[0]}-{next(iter(c[2]))}" for c in CASES])
def test_the_gradients_are_the_same_bits_from_less_memory(name, target, step):
    _, model, batch, loss = rewritten(name, "cpu", target, step)
    ids = torch.randint(500, batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    batch = {**batch, "input_ids": ids}
    for p in tuned_parameters(model).values():
        nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(p.numel()))
    value, expected = gradients(model, loss, batch)
    before = saved(model, loss, batch)
    by_layer(model)
    again, found = gradients(model, loss, batch)
    assert torch.equal(value, again) and all(torch.equal(found[name], one) for name, one in expected.items())
    assert all(one.abs().sum() > 0 for one in found.values())
    after = saved(model, loss, batch)
    assert after < before / 3
    meta = rewritten(name, "meta", target, step)
    plain = step_cost(meta[0], meta[1], meta[2], loss, OPTIMISERS["adamw"].entries)
    by_layer(meta[1])
    less = step_cost(meta[0], meta[1], meta[2], loss, OPTIMISERS["adamw"].entries)
    assert less.activations == pytest.approx(after, rel=0.1)
    assert 0.3 < less.overhead - plain.overhead < 0.6


def test_a_model_without_layers_is_refused():
    model = nn.ModuleDict({"one": nn.Linear(4, 4)})
    model.forward = lambda x: model["one"](x)
    graph = trace(model, Inputs(args=(torch.zeros(2, 4),)))
    tuned = rewrite(graph, plan(graph, [Rule(target="one.weight", apply=[{"lora": {"rank": 1}}])]))
    with pytest.raises(SpecError, match="no layers to compute again"):
        by_layer(tuned)


def test_the_objective_is_a_mean():
    _, model, batch, loss = rewritten("bert", "cpu", BERT, {"lora": {"rank": 4}})
    twice = {name: torch.cat([value, value]) for name, value in batch.items()}
    model.eval()
    torch.testing.assert_close(loss(model, batch), loss(model, twice))


def test_layers_are_recomputed_until_a_limit_is_met():
    """Half of what the plain step saves: as few layers as do, a loss and gradients of the same bits."""
    name, target, step = "llama", "model.layers.*.{self_attn,mlp}.*.weight", {"lora": {"rank": 4}}
    _, model, batch, loss = rewritten(name, "cpu", target, step)
    meta = rewritten(name, "meta", target, step)
    plain = saved_bytes(*meta[1:])
    assert fewest(meta[1], lambda one: True) == 0
    count = fewest(meta[1], lambda one: saved_bytes(one, *meta[2:]) <= plain * 0.6)
    found = []
    for layers in range(count + 1):
        again = meta[1].clone("train")
        by_layer(again, layers)
        found.append(saved_bytes(again.train(), *meta[2:]))
    assert found == sorted(found, reverse=True) and found[-1] <= plain * 0.6 < found[-2]
    value, expected = gradients(model, loss, batch)
    by_layer(model, count)
    again, grads = gradients(model, loss, batch)
    assert torch.equal(value, again) and all(torch.equal(grads[name], one) for name, one in expected.items())
    assert saved(model, loss, batch) == pytest.approx(found[-1], rel=0.03)
