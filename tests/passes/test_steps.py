"""Passes of steps together, fast and lean: 20 steps of AdamW with the same losses in float64, and what they keep."""

import copy

import pytest
import torch
from torch import nn

from rewriter import Inputs, Rule, plan, rewrite, trace, tuned_parameters
from rewriter.graph.products import linear_and
from rewriter.passes.base import Context
from rewriter.passes.fuse.fold_frozen import FOLDED
from rewriter.passes.pipelines import PASSES
from rewriter.plan.cost import kept_bytes
from rewriter.training.evaluation import for_steps
from tests.architectures import inputs_of, traced

pytestmark = pytest.mark.xdist_group("architectures")

STEPS, ROWS, LENGTH = 20, 3, 9
TARGETS = {
    "bert": "bert.encoder.layer.*.{attention.self.{query,key,value},**.dense}.weight",
    "llama": "model.layers.*.**.{q,k,v,o,gate,up,down}_proj.weight",
}
CHAINS = {
    "lora": [{"lora": {"rank": 2, "alpha": 4}}],
    "dropout": [{"lora": {"rank": 2, "dropout": 0.2}}],
    "dora": [{"dora": {"rank": 2}}],
    "ia3": ["ia3"],
    "ssb": ["ssb"],
    "delora": [{"delora": {"rank": 2}}],
    "vera": [{"vera": {"rank": 2}}],
    "c3a": [{"c3a": {"block": 4}}],
    "deft": [{"deft": {"rank": 2}}],
    "randlora": [{"randlora": {"rank": 4, "alpha": 0.1}}],
    "both": [{"lora": {"rank": 2}}, "ssb"],
}
OFF = [one.name for one in PASSES if "train" in one.stages and one.name != "defer_head"]
# Sums are taken in another order: 20 steps of it are below 1e-13 here.
CLOSE = 1e-12


def made(kind, chain):
    _, inputs, graph = traced(kind)
    out = rewrite(graph, plan(graph, [Rule(target=TARGETS[kind], apply=CHAINS[chain])]))
    generator = torch.Generator().manual_seed(0)
    for p in tuned_parameters(out).values():
        p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return out.train(), inputs_of(kind, inputs, ROWS, LENGTH)


def loss_of(model, batch):
    return model(**batch).logits.square().mean()


def losses(model, batch):
    values = {name: p.detach().clone() for name, p in tuned_parameters(model).items()}
    optimiser = torch.optim.AdamW(tuned_parameters(model).values(), lr=1e-2)
    torch.manual_seed(0)
    found = []
    for _ in range(STEPS):
        loss = loss_of(model, batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    for name, p in tuned_parameters(model).items():
        p.data.copy_(values[name])
    return torch.tensor(found, dtype=torch.float64)


def for_step(model, lean=False, off=()):
    out = model.clone()
    for_steps(out, Context("train", lean=lean), off)
    return out


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("kind", TARGETS)
def test_twenty_steps_have_the_same_losses(kind, chain):
    model, batch = made(kind, chain)
    expected = losses(model, batch)
    for lean in (False, True):
        found = losses(for_step(model, lean), batch)
        assert (found - expected).abs().max() <= CLOSE * expected.abs().max()
    assert expected[-1] != expected[0]


@pytest.mark.parametrize("off", OFF)
def test_each_pass_can_be_left_out(off):
    model, batch = made("bert", "dora")
    expected = losses(model, batch)
    found = losses(for_step(model, True, (off,)), batch)
    assert (found - expected).abs().max() <= CLOSE * expected.abs().max()


def kept(model, batch):
    return kept_bytes(model, batch, loss_of)


@pytest.mark.parametrize("kind", TARGETS)
def test_lean_keeps_less_than_fast(kind):
    """Of low-rank terms what their factors read is not kept: beside the frozen model's, x A alone is."""
    model, batch = made(kind, "lora")
    frozen = copy.deepcopy(traced(kind)[0]).requires_grad_(False).train()
    frozen.get_input_embeddings().register_forward_hook(lambda module, given, result: result.requires_grad_())
    fast, lean, floor = (kept(one, batch) for one in (for_step(model), for_step(model, True), frozen))
    assert lean - floor <= 0.6 * (fast - floor)


def test_scaled_results_are_not_kept_twice():
    model, batch = made("bert", "ia3")
    plain, after = kept(model, batch), kept(for_step(model, off=("small_masks",)), batch)
    # GELU keeps what it reads anyway; attention with dropout keeps copies of its own.
    config = traced("bert")[0].config
    assert plain - after == 8 * ROWS * LENGTH * config.intermediate_size * config.num_hidden_layers


def test_transforms_are_not_kept():
    """Of b entries b / 2 + 1 complex numbers: what they are of is kept in their place, where nothing else keeps it."""
    model, batch = made("bert", "c3a")
    plain, after = (kept(for_step(model, off=off), batch) for off in (("recompute_transforms",), ()))
    size = 16 * 3 / 4
    inputs = ROWS * LENGTH * sum(site.shape[0] for site in model.plan.sites)
    numbers = sum(site.parameters for site in model.plan.sites)
    assert 0 <= plain - after - size * (inputs + numbers) + 8 * inputs <= 8 * inputs


def test_dropout_keeps_a_byte_of_an_entry():
    """Instead of a number; the first one is below what is tuned, the last one reads the pooled token."""
    model, batch = made("bert", "ia3")
    config = traced("bert")[0].config
    entries = (2 * config.num_hidden_layers * LENGTH + 1) * ROWS * config.hidden_size
    steps = for_step(model, off=("small_masks",)), for_step(model)
    numbers, small = (kept(one, batch) for one in steps)
    assert numbers - small == (8 - 1) * entries
    outs = []
    for one in steps:
        torch.manual_seed(0)
        outs.append(one(**batch).logits)
    torch.testing.assert_close(*outs, rtol=1e-14, atol=0)


def test_norms_of_frozen_weights_are_computed_once():
    model, _ = made("bert", "dora")
    after = for_step(model)
    folded = {name: b for name, b in after.named_buffers() if name.startswith(FOLDED)}
    sites = model.plan.sites
    assert len(folded) == len(sites)
    weights = dict(model.named_parameters())
    for site, value in zip(sites, folded.values(), strict=True):
        torch.testing.assert_close(value, weights[site.place].square().sum(1), rtol=1e-12, atol=0)
    assert not [name for name in after.state_dict() if name.startswith(FOLDED)]


def test_a_choice_of_a_schedule_is_no_frozen_tensor():
    graph = traced("bert")[2]
    rule = Rule(target=TARGETS["bert"], apply=[{"pafi": {"density": 0.1}}, {"dora": {"rank": 2}}])
    out = rewrite(graph, plan(graph, [rule])).train()
    after = for_step(out)
    assert not [name for name, _ in after.named_buffers() if name.startswith(FOLDED)]


def test_terms_are_added_where_the_product_lies():
    model, _ = made("bert", "lora")
    graph = for_step(model).graphs["train"]
    sums = [node for node in graph.nodes if getattr(node.target, "serves", None) is linear_and]
    assert len(sums) == len(model.plan.sites)
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default)
    cuda = model.clone()
    for_steps(cuda, Context("train", device="cuda"))
    assert not cuda.graphs["train"].find_nodes(op="call_function", target=torch.ops.aten.t.default)


def test_weights_are_multiplied_as_they_are_stored():
    """Of DEFT: relu(P)^t W in the place of W^t relu(P), and P^t, the other factor, is contiguous."""
    model, _ = made("bert", "deft")
    graph = for_step(model).graphs["train"]
    products = graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)
    weights = {site.place for site in model.plan.sites}
    assert {node.args[1].target for node in products} == weights
    turned = [node for node in graph.nodes if node.target is torch.ops.aten.transpose.int and node.args[1:] == (-2, -1)]
    copied = {user.target for node in turned if "deft" in str(node.args[0].target) for user in node.users}
    assert copied == {torch.ops.aten.contiguous.default}


def test_a_scale_of_zero_has_its_gradient():
    model, batch = made("bert", "ia3")
    for p in tuned_parameters(model).values():
        nn.init.normal_(p)
        p.data[::3] = 0
    found, expected = [], []
    for one, grads in ((for_step(model), found), (model, expected)):
        torch.manual_seed(0)
        grads += torch.autograd.grad(loss_of(one, batch), list(tuned_parameters(one).values()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16, dtype=torch.float64), nn.Linear(16, 16, dtype=torch.float64)

    def forward(self, x):
        return self.second(self.first(x).relu_())


def test_results_that_are_overwritten_are_not_kept():
    model = InPlace()
    inputs = Inputs(args=(torch.zeros(4, 16, dtype=torch.float64),), dynamic={0: {0: "batch"}})
    graph = trace(model, inputs)
    out = rewrite(graph, plan(graph, [Rule(target="{first,second}.weight", apply=["ia3"])])).train()
    x, grads = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), []
    for one in (out, for_step(out)):
        grads.append(torch.autograd.grad(one(x).square().sum(), list(tuned_parameters(one).values())))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
