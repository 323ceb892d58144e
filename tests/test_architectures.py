"""Every architecture: spec -> plan -> rewrite -> one optimiser step -> merge, on tiny random models."""

import copy
from functools import lru_cache

import pytest
import torch

from rewriter import Rule, merge, plan, rewrite, trace, tuned_parameters
from tests.architectures import ARCHITECTURES, build, inputs_of

MATRIX = [
    ["full"],
    ["sam_parser"],
    ["ia3"],
    ["ssl"],
    ["ssb"],
    [{"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}],
    [{"trilora": {"rank": 4}}],
    [{"flora": {"rank": 4}}],
    [{"dora": {"rank": 4, "alpha": 8}}],
    [{"spectral": {"rank": 4}}],
    ["svdiff"],
    [{"oft": {"block": 4}}],
    [{"boft": {"block": 2, "factors": 2}}],
    [{"hra": {"rank": 4}}],
    ["road"],
    [{"pissa": {"rank": 4}}],
    [{"milora": {"rank": 4}}],
    [{"lora_fa": {"rank": 4}}],
    [{"lora_xs": {"rank": 4}}],
    [{"vera": {"rank": 4}}],
    [{"randlora": {"rank": 4}}],
    [{"loha": {"rank": 2}}],
    [{"lokr": {"rank": 2}}],
    [{"fourierft": {"frequencies": 50}}],
    [{"delora": {"rank": 4}}],
    [{"miss": {"rank": 4}}],
    [{"tied_lora": {"rank": 4}}],
    ["ssb", {"lora": {"rank": 4}}],
    ["svdiff", {"dora": {"rank": 4}}],
]
OTHER = [["full"], ["ssb"], [{"lora": {"rank": 2}}], [{"dora": {"rank": 2}}], ["svdiff"]]
SHAPES = ((1, 5), (2, 9), (4, 13))


@lru_cache(maxsize=2)
def traced(name):
    dtype = torch.float32 if name == "mixtral" else torch.float64  # grouped_mm has no float64.
    model, inputs = build(name, dtype)
    return model, inputs, trace(model, inputs)


def tolerance(name):
    return {"rtol": 1e-3, "atol": 1e-4} if name == "mixtral" else {"rtol": 1e-8, "atol": 1e-9}


def logits(model, x):
    with torch.no_grad():
        return model.eval()(**x).logits


def adapt(name, rules):
    """Rewrite, take one step, merge; checks on the way. Returns the plan and the rewritten model."""
    model, inputs, graph_model = traced(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = plan(graph_model, rules)
    tuned = rewrite(graph_model, found)
    parameters = tuned_parameters(tuned)
    assert sum(p.numel() for p in parameters.values()) == found.trainable_parameters
    assert {n for n, p in tuned.named_parameters() if p.requires_grad} == {f"subspan.{n}" for n in parameters}
    for mode, graph in tuned.graphs.items():
        for node in graph.nodes:
            assert node.op in ("placeholder", "output", "get_attr") or "nn_module_stack" in node.meta, (mode, node)
    dropout = tuned.graphs["eval"].find_nodes(op="call_function", target=torch.ops.aten.dropout.default)
    assert not any(node.args[2] for node in dropout)

    x = inputs_of(name, inputs, 3, 11)
    base = logits(model, x)
    torch.testing.assert_close(logits(tuned, x), base, **tolerance(name))

    tuned.train()
    optimiser = torch.optim.AdamW(parameters.values(), lr=0.02, weight_decay=0.0)
    tuned(**x).logits.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in parameters.values())
    optimiser.step()
    assert all(
        torch.equal(tuned.state_dict()[key], value) for key, value in before.items() if key in tuned.state_dict()
    )

    merged = copy.deepcopy(model)
    merge(tuned, merged)
    for batch, length in SHAPES:
        x = inputs_of(name, inputs, batch, length, seed=batch)
        torch.testing.assert_close(logits(tuned, x), logits(merged, x), **tolerance(name))
    assert (logits(tuned, x) - logits(model, x)).abs().max() > 1e-6
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    return found, tuned


def name_of(chain):
    return "+".join(step if isinstance(step, str) else next(iter(step)) for step in chain)


CASES = [
    *((name, "linear", chain) for name in ARCHITECTURES for chain in MATRIX),
    *((name, "other", chain) for name in ARCHITECTURES for chain in OTHER),
    *((name, "bias", ["bitfit"]) for name, one in ARCHITECTURES.items() if one.bias),
]
# All cases of one architecture in a row, since its trace is kept.
CASES.sort(key=lambda case: list(ARCHITECTURES).index(case[0]))


@pytest.mark.parametrize(("name", "where", "chain"), CASES, ids=[f"{n}-{w}-{name_of(c)}" for n, w, c in CASES])
def test_rewrite_tune_merge(name, where, chain):
    found, _ = adapt(name, [Rule(target=getattr(ARCHITECTURES[name], where), apply=chain)])
    assert found.sites and all(site.merges for site in found.sites)
