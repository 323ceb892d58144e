"""PEFT as the oracle: the same tensors give the same outputs and gradients."""

import copy

import peft
import pytest
import torch
from torch import nn

from rewriter import Inputs, Rule, merge, plan, rewrite, trace, tuned_parameters

N, M, RANK, ALPHA = 12, 10, 3, 6
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


class Net(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.first, self.second = nn.Linear(N, M, bias=bias), nn.Linear(M, N, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


CASES = {
    "lora": (
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["first", "second"]),
        {"lora": {"rank": RANK, "alpha": ALPHA}},
        {"a": "lora_A.default.weight", "b": "lora_B.default.weight"},
    ),
    "dora": (
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True, target_modules=["first", "second"]),
        {"dora": {"rank": RANK, "alpha": ALPHA}},
        {"a": "lora_A.default.weight", "b": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"},
    ),
    "ia3": (
        peft.IA3Config(target_modules=["first", "second"], feedforward_modules=[]),
        "ia3",
        {"l": "ia3_l.default"},
    ),
    "ssl": (
        peft.IA3Config(target_modules=["first", "second"], feedforward_modules=["first", "second"]),
        "ssl",
        {"l": "ia3_l.default"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_outputs_and_gradients(name):
    config, step, leaves = CASES[name]
    # PEFT's (IA)3 scales the bias too; (10) scales W alone, so they agree on linears without a bias.
    net = Net(bias=name != "ia3").double()
    theirs = peft.get_peft_model(copy.deepcopy(net), config)
    graph = trace(net, Inputs(args=(torch.zeros(4, N, dtype=torch.float64),), dynamic={0: {0: "batch"}}))
    ours = rewrite(graph, plan(graph, [Rule(target="{first,second}.weight", apply=[step])]))
    mine, their = tuned_parameters(ours), dict(theirs.base_model.model.named_parameters())
    assert len(mine) == sum(p.requires_grad for p in their.values())
    pairs = []
    for layer in ("first", "second"):
        for leaf, suffix in leaves.items():
            p, q = mine[f"{layer}.weight.{name}.{leaf}"], their[f"{layer}.{suffix}"]
            with torch.no_grad():
                q.copy_(q + 0.3 * torch.randn_like(q))
                p.copy_(q.reshape(-1) if p.ndim == 1 else q.T)
            pairs.append((p, q))
    x = torch.randn(5, N, dtype=torch.float64)
    weights = torch.randn(5, N, dtype=torch.float64)
    ours.train()
    theirs.train()
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    (ours(x) * weights).sum().backward()
    (theirs(x) * weights).sum().backward()
    for p, q in pairs:
        torch.testing.assert_close(p.grad, q.grad.reshape(-1) if p.ndim == 1 else q.grad.T, **CLOSE)
    merge(ours, net)
    torch.testing.assert_close(net(x), theirs.eval().merge_and_unload()(x), **CLOSE)
