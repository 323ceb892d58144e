"""The library on a plain module: plan, rewrite, an own loop, save, load, merge."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from rewriter import (
    Inputs,
    Rule,
    SubspanError,
    load_adapter,
    merge,
    merged_weights,
    plan,
    rewrite,
    save_adapter,
    trace,
    tuned_parameters,
)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def traced(model):
    return trace(model, Inputs(args=(torch.zeros(3, 6, dtype=torch.float64),), dynamic={0: {0: "batch"}}))


RULES = [
    Rule(target="0.weight", apply=["ssb", {"lora": {"rank": 2}}]),
    Rule(target="0.bias", apply=["bitfit"]),
    Rule(target="2.weight", slice={"in": [2, 6]}, apply=[{"dora": {"rank": 2}}]),
]
X = torch.randn(5, 6, dtype=torch.float64)


def adapted(model, new=()):
    graph = traced(model)
    tuned = rewrite(graph, plan(graph, RULES, new))
    with torch.no_grad():
        for parameter in tuned_parameters(tuned).values():
            parameter += 0.3 * torch.randn_like(parameter)
    return tuned


def test_save_load_merge(tmp_path):
    model = net()
    before = model(X)
    tuned = adapted(model)
    expected = tuned(X)
    save_adapter(tuned, tmp_path / "adapter", metrics={"loss": 1.0})
    assert torch.equal(model(X), before)
    loaded = load_adapter(traced(net()), tmp_path / "adapter")
    torch.testing.assert_close(loaded(X), expected, rtol=0, atol=0)
    assert merge(loaded, model) == 0.0
    torch.testing.assert_close(model(X), expected)
    weights = merged_weights(loaded)
    assert set(weights) == {"0.weight", "0.bias", "2.weight"}
    torch.testing.assert_close(weights["2.weight"][:, 6:], net()[2].weight[:, 6:], rtol=0, atol=0)


def test_newly_made_parameters_travel_with_the_adapter(tmp_path):
    """A head that is random in every process is part of the adapter, not of the base."""
    tuned = adapted(net(), new=["2.weight", "2.bias"])
    save_adapter(tuned, tmp_path / "adapter")
    other = net()
    with torch.no_grad():
        other[2].weight.normal_()
        other[2].bias.normal_()
    loaded = load_adapter(traced(other), tmp_path / "adapter")
    torch.testing.assert_close(loaded(X), tuned(X), rtol=0, atol=0)
    merge(loaded, other)
    torch.testing.assert_close(other(X), tuned(X))


def test_refused(tmp_path):
    save_adapter(adapted(net()), tmp_path / "adapter")
    with pytest.raises(SubspanError, match="other base weights"):
        load_adapter(traced(net(seed=1)), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:50], whole[:-8], b"", b"\x80\x04pickle"):
        file.write_bytes(broken)
        with pytest.raises(SubspanError, match="truncated, or not a safetensors file"):
            load_adapter(traced(net()), tmp_path / "adapter")
    tensors = safetensors.torch.load(whole)
    safetensors.torch.save_file({name: t for name, t in list(tensors.items())[1:]}, file)
    with pytest.raises(SubspanError, match="other sites"):
        load_adapter(traced(net()), tmp_path / "adapter")
    manifest = tmp_path / "adapter" / "adapter.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 9}))
    with pytest.raises(SubspanError, match="format 9"):
        load_adapter(traced(net()), tmp_path / "adapter")


def test_a_merge_that_is_not_finite_is_refused():
    tuned = adapted(net())
    with torch.no_grad():
        next(iter(tuned_parameters(tuned).values())).fill_(float("nan"))
    with pytest.raises(SubspanError, match="not finite"):
        merged_weights(tuned)


def test_half_weights_merge_in_float32():
    model = nn.Sequential(nn.Linear(32, 32, bias=False)).bfloat16()
    graph = trace(model, Inputs(args=(torch.zeros(3, 32, dtype=torch.bfloat16),), dynamic={0: {0: "batch"}}))
    tuned = rewrite(graph, plan(graph, [Rule(target="0.weight", apply=[{"lora": {"rank": 4}}])]))
    parameters = tuned_parameters(tuned)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_()
    a, b = parameters["0.weight.lora.a"], parameters["0.weight.lora.b"]
    exact = model[0].weight.float().T + a @ b
    torch.testing.assert_close(merged_weights(tuned)["0.weight"], exact.T.detach())
    stored = merge(tuned, model)
    assert 0 < stored < 0.1 and model[0].weight.dtype == torch.bfloat16
