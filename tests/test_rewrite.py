"""Every architecture: spec -> plan -> rewrite -> one optimiser step -> merge, on tiny random models."""

import copy

import pytest
import torch

from rewriter import Rule, merge, plan, rewrite, tuned_parameters
from rewriter.graph.globs import find
from tests.architectures import ARCHITECTURES, UNLIKE, inputs_of, traced

pytestmark = pytest.mark.xdist_group("architectures")

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
    [{"hira": {"rank": 4}}],
    [{"shira": {"rank": 2}}],
    ["frod"],
    [{"gralora": {"rank": 4}}],
    [{"c3a": {"block": 4}}],
    [{"deft": {"rank": 4}}],
    [{"psoft": {"rank": 4}}],
    [{"adamss": {"rank": 4}}],
    [{"peanut": {"rank": 4}}],
    [{"tinylora": {"rank": 2}}],
    ["waveft"],
    [{"super_tuning": {"rank": 2}}],
    [{"glora": {"rank": 4}}],
    ["ssb", {"lora": {"rank": 4}}],
    ["svdiff", {"dora": {"rank": 4}}],
]
OTHER = [["full"], ["ssb"], [{"lora": {"rank": 2}}], [{"dora": {"rank": 2}}], ["svdiff"]]
SHAPES = ((1, 5), (2, 9), (4, 13))


def tolerance(name):
    return {"rtol": 1e-3, "atol": 1e-4} if name == "mixtral" else {"rtol": 1e-8, "atol": 1e-9}


def logits(model, x):
    with torch.no_grad():
        return model.eval()(**x).logits


def adapt(name, rules):
    """Rewrite, take one step, merge; checks on the way. Returns the plan."""
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
            if "subspan" in node.meta:
                assert node.op == "get_attr" or isinstance(node.target, torch._ops.OpOverload), (mode, node)
                assert node.meta["val"] is not None
    dropout = tuned.graphs["eval"].find_nodes(op="call_function", target=torch.ops.aten.dropout.default)
    assert not any(node.args[2] for node in dropout)

    x = inputs_of(name, inputs, 3, 11)
    base = logits(model, x)
    torch.testing.assert_close(logits(tuned, x), base, **tolerance(name))

    tuned.train()
    optimiser = torch.optim.AdamW(parameters.values(), lr=0.02, weight_decay=0.0)
    tuned(**x).logits.square().mean().backward()
    for site in found.sites:
        gradients = [parameters[leaf].grad for leaf in site.tuned if parameters[leaf].numel()]
        assert any(grad is not None and grad.abs().max() > 0 for grad in gradients), site.label
    optimiser.step()
    state = tuned.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items() if key in state)

    merged = copy.deepcopy(model)
    merge(tuned, merged)
    for site in found.sites:
        assert not torch.equal(merged.get_parameter(site.place), model.get_parameter(site.place)), site.label
    for batch, length in SHAPES:
        x = inputs_of(name, inputs, batch, length, seed=batch)
        torch.testing.assert_close(logits(tuned, x), logits(merged, x), **tolerance(name))
    assert (logits(tuned, x) - logits(model, x)).abs().max() > 1e-6
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    return found


def name_of(chain):
    return "+".join(step if isinstance(step, str) else next(iter(step)) for step in chain)


# Alone on BERT; on the others each on a weight of its own, so that a rewrite is a test of many.
ALONE = [("bert", where, chain) for where, chains in (("linear", MATRIX), ("other", OTHER)) for chain in chains]


@pytest.mark.parametrize(("name", "where", "chain"), ALONE, ids=[f"{n}-{w}-{name_of(c)}" for n, w, c in ALONE])
def test_rewrite_tune_merge(name, where, chain):
    found = adapt(name, [Rule(target=getattr(ARCHITECTURES[name], where), apply=chain)])
    assert found.sites and all(site.merges for site in found.sites)


@pytest.mark.parametrize("name", [name for name in UNLIKE if name != "bert"])
def test_chains_on_an_architecture(name):
    """Every third chain on linears, as many at once as there are; then every third on a weight of another op.

    Seven architectures: a chain is on two of them at least.
    """
    _, _, graph = traced(name)
    third = slice(UNLIKE.index(name) % 3, None, 3)
    chains, done = MATRIX[third], 0
    one, count = ARCHITECTURES[name], len(chains)
    weights = find([one.linear], list(graph.aliases), ())
    while chains:
        some, chains = chains[: len(weights)], chains[len(weights) :]
        rules = [Rule(target=weight, apply=chain) for weight, chain in zip(weights, some, strict=False)]
        found = adapt(name, rules)
        assert len(found.sites) == len(some) and all(site.merges for site in found.sites)
        done += len(some)
    assert done == count
    for chain in OTHER[third]:
        assert adapt(name, [Rule(target=one.other, apply=chain)]).merges


@pytest.mark.parametrize("name", [name for name, one in ARCHITECTURES.items() if one.bias])
def test_biases(name):
    assert adapt(name, [Rule(target=ARCHITECTURES[name].bias, apply=["bitfit"])]).merges
