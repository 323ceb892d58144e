"""A tuned model: several adapters on one set of frozen weights, graphs by name."""

import copy

import pytest
import torch

from rewriter import (
    Rule,
    SubspanError,
    TracedModel,
    TunedModel,
    load_adapter,
    merge,
    plan,
    rewrite,
    save_adapter,
    trace,
    tuned_parameters,
)
from rewriter.graph.traced import copy_graph
from tests.architectures import ARCHITECTURES, build, inputs_of

LINEAR, LAYERS = ARCHITECTURES["bert"].linear, "bert.encoder.layer.*"


def moved(graph, target, step, seed):
    tuned = rewrite(graph, plan(graph, [Rule(target=target, apply=[step])]))
    generator = torch.Generator().manual_seed(seed)
    for value in tuned_parameters(tuned).values():
        value.data += 0.2 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return tuned


@pytest.fixture(scope="module")
def parts():
    model, inputs = build("bert")
    graph = trace(model, inputs)
    return model, graph, inputs_of("bert", inputs, 3, 9)


def logits(model, x):
    with torch.no_grad():
        return model.eval()(**x).logits


def test_adapters_by_name(parts, tmp_path):
    """Of other methods, ranks and places, each as it was alone; the active one is tuned, saved and merged."""
    model, graph, x = parts
    steps = {"default": (LINEAR, {"lora": {"rank": 4}}), "b": (LINEAR, {"dora": {"rank": 2}})}
    steps["c"] = (LAYERS, {"prefix": {"length": 3}})
    alone = {name: moved(graph, *step, seed) for seed, (name, step) in enumerate(steps.items())}
    expected = {name: logits(one, x) for name, one in alone.items()}
    for name in ("b", "c"):
        save_adapter(alone[name], tmp_path / name)
    tuned = alone["default"]
    tuned.hold("b", alone["b"])
    assert tuned.active == "default" and torch.equal(logits(tuned, x), expected["default"])
    assert load_adapter(tuned, tmp_path / "c", "c") is tuned and tuned.active == "c"
    frozen = {name: p.data_ptr() for name, p in graph.named_parameters()}
    for name in ("b", "default", "c", "b"):
        tuned.use(name)
        torch.testing.assert_close(logits(tuned, x), expected[name], rtol=0, atol=0)
        assert tuned.plan.to_dict() == alone[name].plan.to_dict()
        trained = [p for p in tuned.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == tuned.plan.trainable_parameters
        tuned.train()(**x).logits.sum().backward()
        assert all(p.grad is not None for p in trained)
        tuned.zero_grad()
    assert all(frozen[name] == p.data_ptr() for name, p in tuned.named_parameters() if name in frozen)
    save_adapter(tuned, tmp_path / "again")
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter.safetensors"
    ).read_bytes()
    merged = copy.deepcopy(model)
    merge(tuned, merged)
    torch.testing.assert_close(logits(merged, x), expected["b"])
    torch.testing.assert_close(logits(copy.deepcopy(tuned), x), expected["b"], rtol=0, atol=0)


def test_names_of_adapters(parts):
    _, graph, _ = parts
    tuned = moved(graph, LINEAR, {"lora": {"rank": 2}}, 0)
    with pytest.raises(SubspanError, match="no adapter 'b'; there are default"):
        tuned.use("b")
    for name in ("default", "a.b", ""):
        with pytest.raises(SubspanError, match="the name is taken, or is not a plain word"):
            tuned.hold(name, moved(graph, LINEAR, {"lora": {"rank": 2}}, 1))
    other, inputs = build("roberta")
    elsewhere = moved(trace(other, inputs), ARCHITECTURES["roberta"].linear, {"lora": {"rank": 2}}, 0)
    with pytest.raises(SubspanError, match="of another model"):
        tuned.hold("b", elsewhere)


def test_traced_and_tuned_are_two_types(parts):
    _, graph, _ = parts
    assert type(graph) is TracedModel
    tuned = moved(graph, LINEAR, {"lora": {"rank": 2}}, 0)
    assert type(tuned) is TunedModel and tuned.base is graph
    assert "base" not in dict(tuned.named_children())


def test_a_third_graph_has_room(parts):
    """Graphs are run by name; one more beside train and eval is a graph and its signature."""
    _, graph, x = parts
    model = graph.clone()
    model.graphs["decode"], model.signatures["decode"] = copy_graph(graph.graphs["eval"]), graph.signatures["eval"]
    model.recompile()
    with torch.no_grad():
        torch.testing.assert_close(model.run("decode", **x).logits, logits(graph, x), rtol=0, atol=0)
    with pytest.raises(SubspanError, match="no decode graph was traced, only train, eval"):
        graph.run("decode", **x)
