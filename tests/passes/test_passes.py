"""Every pass, by its registration: the harness over the tiny architectures, 20 steps with and without it, names."""

from functools import cache

import pytest
import torch

from rewriter import Inputs, Rule, Session, SpecError, plan, rewrite, trace, tuned_parameters
from rewriter.passes import manager
from rewriter.passes.base import Pass
from rewriter.passes.pipelines import PASSES
from tests import tiny
from tests.architectures import ARCHITECTURES, UNLIKE, build, cleaned, inputs_of, raw
from tests.passes.harness import check_graphs, check_numbers, every_place, light, reference, rewritten
from tests.pipelines.test_run import call

pytestmark = pytest.mark.xdist_group("architectures")

SWITCHABLE = [one for one in PASSES if one.numerics == "preserving"]
CASES = [(name, one) for name in UNLIKE for one in SWITCHABLE]


@pytest.mark.parametrize(("name", "one"), CASES, ids=[f"{name}-{one.name}" for name, one in CASES])
def test_the_numbers_are_the_same_without_it(name, one):
    check_numbers(one, name)


@pytest.mark.parametrize("name", UNLIKE)
def test_graphs_are_true(name):
    check_graphs(reference(name)[0], name)


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "gpt2", "llama", "vit", "t5"])
def test_graphs_are_true_at_every_place(name):
    check_graphs(rewritten(name, every_place(name)), name)


@cache
def twenty_losses(without):
    """Losses of 20 steps of AdamW, with dropout, a penalty and a chain."""
    inputs, graph = raw("bert")[1], cleaned("bert", without)
    rules = [
        Rule(target=ARCHITECTURES["bert"].linear, apply=["ssb", {"lora": {"rank": 4, "dropout": 0.1, "mpc": "o"}}]),
        Rule(target="bert.pooler.dense.weight", apply=[{"dora": {"rank": 2}}]),
    ]
    tuned = rewrite(graph, plan(graph, rules), without=without).train()
    optimiser = torch.optim.AdamW(tuned_parameters(tuned).values(), lr=1e-3)
    torch.manual_seed(0)
    losses = []
    for step in range(20):
        loss = tuned(**inputs_of("bert", inputs, 4, 9, seed=step)).logits.square().mean()
        loss = loss + sum(tuned.penalties.values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("one", SWITCHABLE, ids=lambda one: one.name)
def test_twenty_steps_without_it(one):
    """float64: what rounding makes of 20 steps is seen to be 1e-12 relative at most."""
    assert twenty_losses((one.name,)) == pytest.approx(twenty_losses(()), rel=1e-10)


def test_shared_inputs_are_one_product():
    """q, k and v read one x: in each layer one product of [A A A], and one of the feed-forward's own."""
    tuned = rewritten("bert", [Rule(target=ARCHITECTURES["bert"].linear, apply=[{"lora": {"rank": 4}}])])
    cats = tuned.graphs["train"].find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    assert [len(node.args[0]) for node in cats if "subspan" in node.meta] == [3, 3]
    sums = tuned.graphs["train"].find_nodes(op="call_function", target=torch.ops.aten.addmm.default)
    assert len(sums) == 12
    plain = rewritten("bert", light("bert"), ("share_inputs", "accumulate")).graphs["train"]
    assert not plain.find_nodes(op="call_function", target=torch.ops.aten.addmm.default)


@pytest.mark.parametrize(
    ("off", "on", "message"),
    [
        (["acumulate"], [], r"no pass 'acumulate'; did you mean 'accumulate'\?"),
        (["nonsense"], [], "no pass 'nonsense'; there are remove_checks"),
        (["insert_weights"], [], "it can't be left out"),
        ([], ["accumulate"], "does not change numerics"),
    ],
)
def test_wrong_names(off, on, message):
    with pytest.raises(SpecError, match=message) as caught:
        manager.check_names(off, on)
    assert caught.value.path[:2] == ("train", "passes")


def test_what_changes_numerics_runs_only_where_it_is_asked_for(monkeypatch):
    def halve(graph, context):
        """Halve every inserted product."""
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default):
            node.kwargs = {**node.kwargs, "alpha": 0.5}
        return graph

    monkeypatch.setattr(manager, "PASSES", (*PASSES, Pass(halve, ("rewrite",), "changing")))
    model, inputs = build("bert")
    graph = trace(model, inputs, ("eval",))
    found, x = plan(graph, light("bert")), inputs_of("bert", inputs, 2, 7)
    outputs = []
    for also in ((), ("halve",)):
        tuned = rewrite(graph, found, also=also).eval()
        for name, value in sorted(tuned_parameters(tuned).items()):
            torch.manual_seed(len(name))
            value.data.normal_()
        outputs.append(tuned(**x).logits)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-6


def test_the_command(tmp_path):
    spec = tiny.project(tmp_path)
    lines = call("passes").stdout
    assert len(PASSES) >= 6 and all(one.name in lines and one.doc[:30] in lines for one in PASSES)
    counts = Session(spec).changes()
    assert counts["insert_weights"] > 0 and counts["accumulate"] > 0 and counts["insert_sublayers"] == 0
    assert set(counts) == {one.name for one in PASSES}
    shown = call("passes", spec, "--without", "accumulate")
    assert shown.exit_code == 0 and "off" in shown.stdout
    assert "did you mean 'accumulate'" in call("passes", spec, "--without", "acumulate").stderr
    assert call("passes", "--without", "nonsense").exit_code == 1


class Towers(torch.nn.Module):
    """Two inputs, and a projection that both share."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.shared = (torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        first = self.one(x)
        second = self.two(x.tanh())
        return first + second + self.shared(x) + self.shared(x.tanh())


def test_a_factor_of_two_inputs_is_shared_with_both():
    model = Towers().double()
    graph = trace(model, Inputs(args=(torch.zeros(3, 8, dtype=torch.float64),), dynamic={0: {0: "batch"}}))
    found, x = plan(graph, [Rule(target="*.weight", apply=[{"lora": {"rank": 2}}])]), torch.randn(5, 8).double()
    outputs = []
    for without in ((), ("share_inputs",)):
        tuned = rewrite(graph, found, without=without)
        generator = torch.Generator().manual_seed(0)
        for _, value in sorted(tuned_parameters(tuned).items()):
            value.data = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        outputs.append(tuned(x))
    torch.testing.assert_close(*outputs)
