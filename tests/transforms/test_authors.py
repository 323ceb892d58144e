"""What authors of transforms get wrong, and what their schedules may do."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from rewriter import Budget, Inputs, Rule, SpecError, SubspanError, merged_weights, plan, rewrite, settle, trace
from rewriter.algebra import Dense
from rewriter.files import load_tensors, save_tensors
from rewriter.methods.lora import lora
from rewriter.transforms import TRANSFORMS, Rank, Schedule, kaiming_uniform, transform
from rewriter.tuned import adapter_tensors


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(TRANSFORMS, "_found", dict(TRANSFORMS.items()))


def traced(*layers, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(*layers).to(dtype)
    return model, trace(model, Inputs(args=(torch.zeros(3, 8, dtype=dtype),), dynamic={0: {0: "batch"}}))


def planned(apply, graph=None):
    return plan(graph or traced(nn.Linear(8, 8))[1], [Rule(target="*.weight", apply=apply)])


def inplace(w, site):
    """W changed where it lies."""
    d = w.dense()
    d += site.tuned("b", (site.n, site.m), 0.1)
    return Dense(d)


def twice(w, site, *, rank: Rank = 2):
    """lora on lora."""
    return lora(lora(w, site, rank=rank), site, rank=rank)


def tensor(w, site):
    """No operator."""
    return w.dense()


def item(w, site):
    """A number from a tensor."""
    return w @ Dense(site.tuned("b", (site.m, site.m), 0.1) * float(w.dense().sum().item()))


def numbers(w, site):
    """A tensor out of numbers."""
    return w + Dense(torch.tensor([[1.0] * 8] * 8, dtype=w.dense().dtype) * site.tuned("b", (8, 8), 0.0))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (inplace, "inplace: the expression changes the frozen weight in place"),
        (twice, "lora declares the tensor 'a' twice|twice declares the tensor 'a' twice"),
        (tensor, "tensor returns Tensor, not an operator"),
        (item, r"item: the expression fails on 0\.weight: "),
    ],
)
def test_what_is_refused_at_plan(function, message):
    transform("extension")(function)
    model, graph = traced(nn.Linear(8, 8))
    before = model[0].weight.detach().clone()
    with pytest.raises(SpecError, match=message):
        planned([function.__name__], graph)
    assert torch.equal(model[0].weight, before)


def test_a_tensor_out_of_numbers_is_refused_by_name():
    transform("extension")(numbers)
    _, graph = traced(nn.Linear(8, 8))
    with pytest.raises((SubspanError, SpecError), match=r"site\.frozen|fails on"):
        rewrite(graph, planned(["numbers"], graph))


def test_an_option_needs_a_type():
    def untyped(w, site, *, rank):
        """No type."""

    with pytest.raises(TypeError, match="untyped: the option 'rank' needs a type"):
        transform("extension")(untyped)


def test_names_in_a_chain_are_different():
    def lora_2(w, site):
        """Called as the second lora would be."""
        return lora(w, site, rank=2)

    transform("extension")(lora_2)
    with pytest.raises(SpecError, match="two transforms of the chain are called lora_2"):
        planned([{"lora": {"rank": 2}}, {"lora": {"rank": 2}}, "lora_2"])


def test_an_expression_that_leaves_the_program_is_a_mistake(tmp_path):
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(SubspanError, match=r"--transforms .*leaves\.py"):
        TRANSFORMS.load_file(tmp_path / "leaves.py")


def test_two_packages_with_one_name(monkeypatch):
    from rewriter.transforms.registry import Origin

    monkeypatch.setattr(TRANSFORMS, "ambiguous", {})
    for package in ("one", "two"):
        with TRANSFORMS.loading(Origin(package, "1.0")):
            exec(f"def shared(w, site):\n    '''x'''\n    return w\nshared.__module__ = {package!r}", space := {})
            transform("extension")(space["shared"])
    with pytest.raises(ValueError, match=r"two packages have a transform shared: one 1\.0 and two 1\.0"):
        Rule(target="w", apply=["shared"])


@dataclass(frozen=True)
class Watch(Schedule):
    """Keeps one tensor under two names, one of them `now`, and looks at what sites share."""

    def before_step(self, pool):
        for one in pool:
            assert one["r"].shape == (8, 2) and one["t"].shape == (2, 8)
            one.state["now"] = one.state["best"] = one["b"].grad.abs()


def watched(w, site):
    """W + R T + A B."""
    site.schedule(Watch())
    r, t = site.frozen("r", (site.n, 2), kaiming_uniform), site.tied("t", (2, site.m), 0.0)
    a, b = site.tuned("a", (site.n, 2), kaiming_uniform), site.tuned("b", (2, site.m), 0.0)
    return w + Dense(r) @ Dense(t) + Dense(a) @ Dense(b)


def test_states_by_any_name(tmp_path):
    transform("extension")(watched)
    _, graph = traced(nn.Linear(8, 8), nn.Linear(8, 8))
    tuned = rewrite(graph, planned(["watched"], graph)).train()
    budget = Budget(tuned)
    tuned(torch.randn(4, 8, dtype=torch.float64)).sum().backward()
    budget.before_step()
    save_tensors(budget.state(), tmp_path / "state")
    again = Budget(rewrite(graph, planned(["watched"], graph)))
    again.load(load_tensors(tmp_path / "state"))
    state = again.members["0.weight.watched"].state
    assert torch.equal(state["now"], state["best"]) and float(state["now"].max()) > 0


class Experts(nn.Module):
    """A batch of matrices and a matrix of the same size."""

    def __init__(self):
        super().__init__()
        self.e, self.a = nn.Parameter(torch.randn(3, 8, 8)), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.a((x @ self.e).sum(0))


@pytest.mark.parametrize("name", ["vera", "lora_fa", "randlora", "miss", "tinylora"])
def test_frozen_constants_of_batches_and_of_matrices_are_apart(name):
    model = Experts().double()
    graph = trace(model, Inputs(args=(torch.zeros(4, 8, dtype=torch.float64),), dynamic={0: {0: "batch"}}))
    rule = Rule(target="**", apply=[{name: {"rank": 2}}])
    tuned = rewrite(graph, plan(graph, [rule]))
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(tuned(x), model(x))
    assert {key: value.shape for key, value in merged_weights(tuned).items()} == {"e": (3, 8, 8), "a.weight": (8, 8)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [{"psoft": {"rank": 2}}, {"oft": {"block": 4}}, {"boft": {"block": 4, "factors": 2}}])
def test_rotations_of_half_weights_run_on_the_cpu(dtype, step):
    model, graph = traced(nn.Linear(8, 8), dtype=dtype)
    tuned = rewrite(graph, planned([step], graph)).train()
    x = torch.randn(5, 8).to(dtype)
    tuned(x).float().square().sum().backward()
    torch.testing.assert_close(tuned(x), model(x), rtol=0.05, atol=0.05)


def test_settling_one_of_several_adapters_is_refused():
    _, graph = traced(nn.Linear(8, 8))
    one = rewrite(graph, planned([{"lora": {"rank": 2}}], graph))
    other = rewrite(graph, planned([{"diff_pruning": {"density": 0.1}}], graph))
    one.hold("b", other)
    one.use("b")
    assert all(p.requires_grad for name, p in other.named_parameters() if name.startswith("subspan."))
    with pytest.raises(SubspanError, match="before it is held together"):
        settle(one)
    one.use("default")
    assert settle(one) is one and set(adapter_tensors(one)) == {"0.weight.lora.a", "0.weight.lora.b"}
