"""Methods that need a place inside a module, data, or a budget: tuned, settled, saved, loaded, merged or kept."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from rewriter import (
    Budget,
    Rule,
    SpecError,
    allocate,
    load_adapter,
    merge,
    plan,
    rest,
    rewrite,
    save_adapter,
    settle,
    trace,
    tuned_parameters,
)
from rewriter.files import load_into, save_tensors
from rewriter.graph.globs import find
from rewriter.methods.adalora import Prune
from rewriter.training.schedules import NOW
from rewriter.tuned import adapter_tensors
from tests.architectures import ARCHITECTURES, UNLIKE, inputs_of, traced

pytestmark = pytest.mark.xdist_group("architectures")

LAYERS = {
    "bert": "bert.encoder.layer.*",
    "roberta": "roberta.encoder.layer.*",
    "deberta-v2": "deberta.encoder.layer.*",
    "distilbert": "distilbert.transformer.layer.*",
    "modernbert": "model.layers.*",
    "gpt2": "transformer.h.*",
    "llama": "model.layers.*",
    "qwen3": "model.layers.*",
    "mixtral": "model.layers.*",
    "vit": "vit.layers.*",
    "t5": "encoder.block.*",
}
TOKENS = {
    "gpt2": "transformer.wte",
    "t5": "encoder.embed_tokens",
    "llama": "model",
    "qwen3": "model",
    "mixtral": "model",
}
INSIDE = {
    "hadapter": {"bottleneck": 4},
    "padapter": {"bottleneck": 4},
    "pa": {"rank": 4},
    "prefix": {"length": 5, "hidden": 7},
    "mam": {"length": 5, "rank": 3},
    "prompt": {"length": 5},
}
LINEAR = {
    "pa": {"rank": 4},
    "lora": {"rank": 4, "mpc": "o", "scale": "learned"},
    "trilora": {"rank": 4, "mpc": "d", "scale": "rslora"},
    "flora": {"rank": 4, "mpc": "n"},
    "adalora": {"rank": 4, "target_rank": 2, "interval": 1},
    "diff_pruning": {"density": 0.05},
    "pafi": {"density": 0.05},
    "fish_mask": {"density": 0.05, "samples": 4},
    "fish_dip": {"density": 0.05, "samples": 2, "interval": 2},
    "spt": {"rank": 2, "density": 0.3, "samples": 4},
    "lora_dash": {"rank": 2, "directions": 3, "start": 0.5},
}
STEPS = 6
ALONE = [
    *(("inside", method) for method in INSIDE),
    *(("linear", method) for method in LINEAR),
    ("bias", "s_bitfit"),
]


def rule(name, where, method):
    if where == "inside":
        target = LAYERS[name] if method != "prompt" else TOKENS.get(name, "**.embeddings")
        return Rule(target=target, apply=[{method: INSIDE[method]}])
    if where == "linear":
        return Rule(target=ARCHITECTURES[name].linear, apply=[{method: LINEAR[method]}])
    target = ARCHITECTURES[name].bias if where == "bias" else "decoder.block.*.layer.1.EncDecAttention.{q,k,v,o}.weight"
    return Rule(target=target, apply=[method])


def logits(model, x):
    with torch.no_grad():
        return model.eval()(**x).logits


def objective(model, batch):
    return model(**batch).logits.square().mean()


def stepping(tuned, budget, optimiser, x, steps):
    """Optimiser steps with their budget; the number of each when it is done."""
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        tuned.train()(**x).logits.square().mean().backward()
        budget.before_step()
        optimiser.step()
        budget.after_step(step, steps, optimiser)
        yield step


def whole_life(name, rules, tmp_path):
    """Choose, tune, settle, save, load, merge or keep; checks on the way. Returns the settled model."""
    model, inputs, graph = traced(name)
    rows = [inputs_of(name, inputs, 1, 7, seed=i) for i in range(8)]
    collate = lambda some: some[0]  # noqa: E731
    found, values = allocate(graph, plan(graph, rules), rows, collate, objective)
    tuned = rewrite(graph, found, values=values)
    assert sum(p.numel() for p in tuned_parameters(tuned).values()) == found.trainable_parameters
    x = inputs_of(name, inputs, 3, 11)
    if not any(site.rows for site in found.sites):
        torch.testing.assert_close(logits(tuned, x), logits(model, x))
    optimiser = torch.optim.AdamW(tuned_parameters(tuned).values(), lr=0.02, weight_decay=0.0)
    budget = Budget(tuned, rows, collate, objective)
    torch.manual_seed(0)
    advance(tuned, budget, optimiser, x, range(1, STEPS + 1), STEPS)
    before = logits(tuned, x)
    settled = settle(tuned, budget)
    # What a schedule drops was held at 0, or made by what is folded.
    torch.testing.assert_close(logits(settled, x), before, **close(name))
    assert (logits(settled, x) - logits(model, x)).abs().max() > 1e-6
    assert settled.plan.trainable_parameters == sum(p.numel() for p in tuned_parameters(settled).values())

    save_adapter(settled, tmp_path / "adapter")
    loaded = load_adapter(graph, tmp_path / "adapter")
    assert loaded.plan.to_dict() == settled.plan.to_dict()
    assert torch.equal(logits(loaded, x), logits(settled, x))
    merged = copy.deepcopy(model)
    merge(loaded, merged, partly=True)
    shipped = merged
    if not loaded.plan.merges:
        # The graph with merged weights; that a trace of the merged module is the same graph, BERT shows.
        onto = trace(merged, inputs, modes=("eval",)) if name == "bert" else graph.clone("eval")
        merge(loaded, onto, partly=True)
        shipped = rest(loaded, onto)
    for batch, length in ((1, 5), (4, 13)):
        x = inputs_of(name, inputs, batch, length, seed=batch)
        torch.testing.assert_close(logits(loaded, x), logits(shipped, x), **close(name))
    return settled


def close(name):
    return {"rtol": 1e-3, "atol": 1e-4} if name == "mixtral" else {"rtol": 1e-8, "atol": 1e-9}


def stays(where, method):
    return where == "inside" or method == "pa" or LINEAR.get(method, {}).get("mpc") == "n"


@pytest.mark.parametrize(("where", "method"), ALONE, ids=["-".join(case) for case in ALONE])
def test_tune_settle_save_load_merge(where, method, tmp_path):
    settled = whole_life("bert", [rule("bert", where, method)], tmp_path)
    assert settled.plan.merges != stays(where, method)


@pytest.mark.parametrize("name", [name for name in UNLIKE if name != "bert"])
def test_every_method_on_an_architecture(name, tmp_path):
    """Each on a place of its own: what merges; what stays, in two layers; and rows before the tokens."""
    one, graph = ARCHITECTURES[name], traced(name)[2]
    weights = [w for w in find([one.linear], list(graph.aliases), ()) if "EncDecAttention" not in w]
    on = lambda methods: [Rule(target=w, apply=[{m: LINEAR[m]}]) for w, m in zip(weights, methods, strict=False)]  # noqa: E731
    inside = lambda layer, *methods: [  # noqa: E731
        Rule(target=LAYERS[name].replace("*", str(layer)), apply=[{method: INSIDE[method]}]) for method in methods
    ]
    merging = [method for method in LINEAR if not stays("linear", method)]
    biases = [rule(name, "bias", "s_bitfit")] if one.bias and name != "modernbert" else []
    cross = [rule(name, "cross", "xattn")] if name == "t5" else []
    groups = [
        [*on(merging[: len(weights)]), *biases, *cross],
        [*on(["pa", "flora"]), *inside(0, "hadapter", "prefix"), *inside(1, "mam")],
        [*on(merging[len(weights) :]), *inside(0, "padapter"), *inside(1, "pa")],
    ]
    if name != "vit":
        groups[2].append(rule(name, "inside", "prompt"))
    for i, rules in enumerate(groups):
        (tmp_path / str(i)).mkdir()
        assert whole_life(name, rules, tmp_path / str(i)).plan.merges == (i == 0)


def test_counts_of_places():
    """TRANSFORMS' closed formulas: d = 16, two layers."""
    _, _, graph = traced("bert")

    def count(method, options):
        target = LAYERS["bert"] if method != "prompt" else "bert.embeddings"
        return plan(graph, [Rule(target=target, apply=[{method: options}])]).trainable_parameters

    assert count("hadapter", {"bottleneck": 4}) == 2 * 2 * (2 * 16 * 4 + 4 + 16)
    assert count("padapter", {"bottleneck": 4}) == 2 * (2 * 16 * 4 + 4 + 16)
    assert count("prefix", {"length": 5}) == 2 * 2 * 5 * 16
    assert count("prompt", {"length": 5}) == 5 * 16
    assert count("mam", {"length": 5, "rank": 3}) == 2 * (2 * 5 * 16 + 3 * 32)


def test_budgets_are_kept():
    _, inputs, graph = traced("bert")
    rows = [inputs_of("bert", inputs, 1, 7, seed=i) for i in range(8)]
    linear = ARCHITECTURES["bert"].linear
    sizes = 2 * (4 * 256 + 2 * 384)
    for method in ("fish_mask", "fish_dip", "diff_pruning"):
        found = plan(graph, [Rule(target=linear, apply=[{method: {"density": 0.05}}])])
        found, values = allocate(graph, found, rows, lambda some: some[0], objective)
        tuned = settle(rewrite(graph, found, values=values))
        assert abs(tuned.plan.trainable_parameters - 0.05 * sizes) <= 6
    with pytest.raises(SpecError, match="has to be selected before"):
        rewrite(graph, plan(graph, [Rule(target=linear, apply=["fish_mask"])]))


def test_adalora_ends_at_its_budget():
    _, inputs, graph = traced("bert")
    options = {"rank": 4, "target_rank": 2, "interval": 1, "start": 0.0, "end": 0.2}
    tuned = rewrite(graph, plan(graph, [Rule(target=ARCHITECTURES["bert"].linear, apply=[{"adalora": options}])]))
    budget, optimiser = Budget(tuned), torch.optim.SGD(tuned_parameters(tuned).values(), lr=0.1)
    x = inputs_of("bert", inputs, 3, 11)
    for _ in stepping(tuned, budget, optimiser, x, 10):
        pass
    given = settle(tuned, budget).plan.given
    assert len(given) == 12 and sum(sizes["rank"] for sizes in given.values()) == 12 * 2
    assert len({sizes["rank"] for sizes in given.values()}) > 1


def test_cubic_schedule():
    schedule = Prune(rank=12, target=4, start=0.1, end=0.3, interval=10)
    ranks = [schedule.ranks(step, 100, 1) for step in (0, 10, 40, 70, 100)]
    assert ranks == [12, 12, round(4 + 8 * 0.5**3), 4, 4]


def test_causal_stays_causal_under_a_prefix():
    """A later token changes nothing before it, though every token sees the prefix."""
    for name in ("gpt2", "llama"):
        _, inputs, graph = traced(name)
        tuned = rewrite(graph, plan(graph, [rule(name, "inside", "prefix")]))
        x = inputs_of(name, inputs, 1, 9)
        y = {**x, "input_ids": torch.cat([x["input_ids"][:, :-1], 3 + (x["input_ids"][:, -1:] + 1) % 50], dim=1)}
        one, other = logits(tuned, x), logits(tuned, y)
        torch.testing.assert_close(one[:, :-1], other[:, :-1])
        assert (one[:, -1] - other[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "target", "step", "message"),
    [
        ("bert", "bert.encoder", {"hadapter": {"bottleneck": 4}}, "holds several layers"),
        ("bert", "bert.encoder.layer.*.query", {"hadapter": {"bottleneck": 4}}, "matches no module"),
        ("bert", "bert.pooler", {"prefix": {"length": 4}}, "no keys or values in"),
        ("bert", "bert.encoder.layer.*.attention.self.query.weight", "xattn", "is for weights of cross-attention"),
        ("bert", "bert.embeddings.word_embeddings.weight", {"pa": {"rank": 4}}, "has no matrix to form"),
        ("vit", "vit.embeddings", {"prompt": {"length": 4}}, "no embeddings in"),
    ],
)
def test_refused(name, target, step, message):
    _, _, graph = traced(name)
    with pytest.raises(SpecError, match=message):
        plan(graph, [Rule(target=target, apply=[step])])


RESUMED = [
    ("inside", "hadapter"),
    ("inside", "prefix"),
    ("inside", "prompt"),
    ("inside", "mam"),
    ("bias", "s_bitfit"),
    *(("linear", method) for method in LINEAR),
]


def advance(tuned, budget, optimiser, x, steps, last):
    for step in steps:
        optimiser.zero_grad()
        loss = tuned.train()(**x).logits.square().mean()
        (loss + sum(tuned.penalties.values())).backward()
        budget.before_step()
        optimiser.step()
        budget.after_step(step, last, optimiser)


@pytest.mark.parametrize(("where", "method"), RESUMED, ids=[method for _, method in RESUMED])
def test_a_schedule_goes_on_from_its_state(where, method, tmp_path):
    """Tensors, optimiser and the budget's state, through files, at the step where `end: 0.5` cuts: the same bits."""
    _, inputs, graph = traced("bert")
    rows = [inputs_of("bert", inputs, 1, 7, seed=i) for i in range(8)]
    x, collate = inputs_of("bert", inputs, 3, 11), lambda some: some[0]
    first = plan(graph, [rule("bert", where, method)])
    found, values = allocate(graph, first, rows, collate, objective)

    def started(found, values):
        tuned = rewrite(graph, found, values=values)
        optimiser = torch.optim.AdamW(tuned_parameters(tuned).values(), lr=0.02)
        return tuned, Budget(tuned, rows, collate, objective), optimiser

    whole = started(found, values)
    torch.manual_seed(0)
    advance(*whole, x, range(1, 4), STEPS)
    tuned, budget, optimiser = whole
    save_tensors(tuned_parameters(tuned), tmp_path / "tuned")
    save_tensors(budget.state(), tmp_path / "budget")
    moments, random, given = copy.deepcopy(optimiser.state_dict()), torch.get_rng_state(), found.given
    advance(*whole, x, range(4, STEPS + 1), STEPS)

    state = load_file(tmp_path / "budget")
    chosen = {name.removesuffix(NOW): value for name, value in state.items() if name.endswith(NOW)}
    broken = started(plan(graph, [rule("bert", where, method)], given=given), chosen)
    load_into(tuned_parameters(broken[0]), tmp_path / "tuned")
    broken[1].load(state)
    broken[2].load_state_dict(moments)
    torch.set_rng_state(random)
    advance(*broken, x, range(4, STEPS + 1), STEPS)

    one, other = (settle(model, budget) for model, budget, _ in (whole, broken))
    assert one.plan.to_dict() == other.plan.to_dict()
    assert adapter_tensors(one).keys() == adapter_tensors(other).keys()
    assert all(torch.equal(value, adapter_tensors(other)[name]) for name, value in adapter_tensors(one).items())


def test_a_state_of_another_model_is_refused():
    _, _, graph = traced("bert")
    tuned = rewrite(graph, plan(graph, [rule("bert", "linear", "adalora")]))
    with pytest.raises(SpecError, match="no schedule of this model"):
        Budget(tuned).load({"elsewhere.adalora.kept": torch.ones(4)})


def test_equal_schedules_are_one_pool():
    """Over rules too; another option of the schedule makes another pool."""
    _, _, graph = traced("bert")
    rules = [
        Rule(target="bert.encoder.layer.0.attention.self.query.weight", apply=[{"adalora": {"rank": 4}}]),
        Rule(target="bert.encoder.layer.1.attention.self.query.weight", apply=[{"adalora": {"rank": 4, "alpha": 9}}]),
        Rule(target="bert.encoder.layer.*.attention.self.key.weight", apply=[{"adalora": {"rank": 3}}]),
    ]
    budget = Budget(rewrite(graph, plan(graph, rules)))
    assert [len(pool) for _, pool in budget.pools] == [2, 2]


def test_the_loss_has_to_reach_what_is_chosen_by_it():
    _, inputs, graph = traced("bert")
    rows = [inputs_of("bert", inputs, 1, 7)]
    found = plan(graph, [Rule(target="bert.encoder.layer.0.intermediate.dense.weight", apply=["fish_mask"])])
    head = lambda model, batch: model.get_parameter("classifier.weight").sum().detach().requires_grad_()  # noqa: E731
    with pytest.raises(SpecError, match=r"the loss does not depend on bert\.encoder\.layer\.0\.intermediate"):
        allocate(graph, found, rows, lambda some: some[0], head)


@pytest.mark.parametrize(("where", "method", "density"), [("linear", "diff_pruning", 0.05), ("bias", "s_bitfit", 0.5)])
def test_what_is_cut_stays_cut(where, method, density):
    """After the cut the entries off the budget stay 0, so nothing is lost when the model is settled."""
    _, inputs, graph = traced("bert")
    target = getattr(ARCHITECTURES["bert"], where)
    options = {"density": density, "end": 0.5}
    tuned = rewrite(graph, plan(graph, [Rule(target=target, apply=[{method: options}])]))
    budget, optimiser = Budget(tuned), torch.optim.AdamW(tuned_parameters(tuned).values(), lr=0.02)
    x = inputs_of("bert", inputs, 3, 11)
    entries = [value for name, value in tuned_parameters(tuned).items() if name.endswith(".d")]
    total = sum(value.numel() for value in entries)
    for step in stepping(tuned, budget, optimiser, x, 10):
        changed = sum(int((value != 0).sum()) for value in entries)
        assert changed <= density * total + 6 if step >= 5 else changed > density * total + 6
    torch.testing.assert_close(logits(settle(tuned, budget), x), logits(tuned, x))


def test_tied_factors_are_one_tensor_for_all_sites_of_a_shape():
    _, _, graph = traced("bert")
    found = plan(graph, [Rule(target=ARCHITECTURES["bert"].linear, apply=[{"tied_lora": {"rank": 4}}])])
    tied = 4 * (16 + 16) + 4 * (16 + 24) + 4 * (24 + 16)
    assert found.trainable_parameters == tied + 2 * (4 * (4 + 16) + (4 + 24) + (4 + 16))
    tuned = rewrite(graph, found)
    assert sum(name.startswith("tied.") for name in tuned_parameters(tuned)) == 6


def test_frozen_random_factors_are_one_tensor_for_all_sites_of_their_shape():
    _, _, graph = traced("bert")
    rules = [Rule(target=ARCHITECTURES["bert"].linear, apply=[{"vera": {"rank": 4}}])]
    buffers = {name for name, _ in rewrite(graph, plan(graph, rules)).named_buffers() if name.startswith("subspan.")}
    sizes = ("a_16x4", "a_24x4", "b_4x16", "b_4x24")
    assert buffers == {f"subspan.frozen.vera.{size}" for size in sizes}


def test_dash_goes_where_the_change_is():
    """The directions chosen are those of the largest |u^t A B v| over the singular value, and nothing moves before."""
    model, inputs, graph = traced("bert")
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    options = {"rank": 2, "directions": 3, "start": 0.5}
    tuned = rewrite(graph, plan(graph, [Rule(target=name, apply=[{"lora_dash": options}])]))
    leaves, budget = tuned_parameters(tuned), Budget(tuned)
    optimiser = torch.optim.AdamW(leaves.values(), lr=0.02)
    x = inputs_of("bert", inputs, 3, 11)
    for step in stepping(tuned, budget, optimiser, x, 8):
        a, b, d = (leaves[f"{name}.lora_dash.{leaf}"].detach() for leaf in "abd")
        if step == 4:
            u, s, vh = torch.linalg.svd(model.get_parameter(name).detach().T, full_matrices=False)
            change = torch.einsum("nk,nm,km->k", u, a @ b, vh).abs() / (s + 1e-6)
            expected = set(change.topk(3).indices.tolist())
        assert bool(d.any()) == (step > 4)
    assert set(tuned.get_buffer(f"subspan.{name}.lora_dash.indices").tolist()) == expected
