"""A traced model behaves like any module."""

import copy

import pytest
import torch
from torch import nn

from rewriter import Inputs, Rule, SubspanError, plan, rewrite, trace, tuned_parameters
from rewriter.graph.traced import assign
from tests.architectures import build, inputs_of


class Noisy(nn.Module):
    """Dropout, a buffer, a tie, positional and keyword inputs, an output that is a dict of a tuple."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.drop = nn.Dropout(0.5)
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x, *, scale):
        y = self.drop(self.a(x)) + self.shift
        return {"y": self.b(y) * scale, "both": (y, x.sum())}


def noisy():
    torch.manual_seed(0)
    model = Noisy().double().eval()
    inputs = Inputs(
        args=(torch.zeros(3, 6, dtype=torch.float64),),
        kwargs={"scale": torch.ones((), dtype=torch.float64)},
        dynamic={0: {0: "batch"}},
    )
    return model, trace(model, inputs)


X, S = torch.randn(5, 6, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)


def test_any_module():
    model, graph = noisy()
    assert graph.tied == {"a.weight": ["a.weight", "b.weight"]}
    assert set(graph.state_dict()) == set(model.state_dict())
    for mode in (True, False):
        model.train(mode)
        graph.train(mode)
        torch.manual_seed(1)
        expected = model(X, scale=S)
        torch.manual_seed(1)
        found = graph(X, scale=S)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(graph.train()(X, scale=S)["y"], graph.eval()(X, scale=S)["y"])


def test_wrong_inputs_are_told():
    _, graph = noisy()
    with pytest.raises(TypeError, match="scaling"):
        graph(X, scaling=S)


def tuned():
    model, inputs = build("bert", torch.float32)
    graph = trace(model, inputs)
    rules = [Rule(target="bert.encoder.layer.*.attention.self.query.weight", apply=[{"lora": {"rank": 2}}])]
    return model, inputs, graph, rewrite(graph, plan(graph, rules))


def test_copies_state_and_devices():
    _, inputs, _, model = tuned()
    x = inputs_of("bert", inputs, 2, 7)
    with torch.no_grad():
        for parameter in tuned_parameters(model).values():
            parameter.normal_()
        expected = model(**x).logits
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(**x).logits, expected, rtol=0, atol=0)
        for parameter in tuned_parameters(twin).values():
            parameter.zero_()
        assert not torch.equal(twin(**x).logits, expected)
        twin.load_state_dict(model.state_dict())
        torch.testing.assert_close(twin(**x).logits, expected, rtol=0, atol=0)
        assert twin.to("cpu", torch.float64)(**x).logits.dtype == torch.float64
    if torch.cuda.is_available():
        on = {key: value.cuda() for key, value in x.items()}
        torch.testing.assert_close(model.cuda()(**on).logits.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_frozen_weights_are_shared_not_copied():
    _, _, graph, model = tuned()
    shared = dict(model.named_parameters())
    assert all(shared[name].data_ptr() == p.data_ptr() for name, p in graph.named_parameters())


def test_compile_is_one_graph():
    _, inputs, _, model = tuned()
    graphs = []

    def backend(module, example):
        graphs.append(module)
        return module

    compiled = torch.compile(model.train(), backend=backend, dynamic=True, fullgraph=True)
    for batch, length in ((2, 7), (3, 9), (4, 12)):
        x = inputs_of("bert", inputs, batch, length)
        torch.manual_seed(0)
        expected = model(**x).logits
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(**x).logits, expected)
    assert len(graphs) == 1


def test_assign_keeps_ties_and_the_old_tensors():
    model, graph = noisy()
    before = model.a.weight.detach().clone()
    clone = graph.clone()
    clone.recompile()
    assign(clone, {"a.weight": torch.zeros(6, 6)})
    assert clone.get_parameter("b.weight") is clone.get_parameter("a.weight")
    assert torch.equal(model.a.weight, before) and clone.get_parameter("a.weight").abs().max() == 0


def test_what_cannot_be_traced_is_one_line():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(SubspanError, match="can't trace Branch") as caught:
        trace(Branch(), Inputs(args=(torch.ones(3),)))
    assert "\n" not in str(caught.value)
