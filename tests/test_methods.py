"""Methods that need a place inside a module, data, or a budget: tuned, settled, saved, loaded, merged or kept."""

import copy
import shutil
from functools import lru_cache

import pytest
import torch
from safetensors.torch import load_file

from pipelines.train import run
from rewriter import (
    Budget,
    Rule,
    SpecError,
    allocate,
    load_adapter,
    load_spec,
    merge,
    plan,
    rest,
    rewrite,
    save_adapter,
    settle,
    trace,
    tuned_parameters,
)
from rewriter.allocate import scheduled_rank
from rewriter.transforms import METHODS
from rewriter.tune import checkpoints
from tests import tiny
from tests.architectures import ARCHITECTURES, build, inputs_of

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
    "t5": "{encoder,decoder}.block.*",
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
CASES = [
    (name, where, method)
    for name, one in ARCHITECTURES.items()
    for where, methods in (
        ("inside", [m for m in INSIDE if m != "prompt" or name != "vit"]),
        ("linear", LINEAR),
        ("bias", ["s_bitfit"] if one.bias and name != "modernbert" else []),
        ("cross", ["xattn"] if name == "t5" else []),
    )
    for method in methods
]


@lru_cache(maxsize=2)
def traced(name):
    model, inputs = build(name, torch.float32 if name == "mixtral" else torch.float64)
    return model, inputs, trace(model, inputs)


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


@pytest.mark.parametrize(("name", "where", "method"), CASES, ids=["-".join(case) for case in CASES])
def test_tune_settle_save_load_merge(name, where, method, tmp_path):
    model, inputs, graph = traced(name)
    rows = [inputs_of(name, inputs, 1, 7, seed=i) for i in range(8)]
    collate = lambda some: some[0]  # noqa: E731
    found, values = allocate(graph, plan(graph, [rule(name, where, method)]), rows, collate, objective)
    tuned = rewrite(graph, found, values=values)
    assert sum(p.numel() for p in tuned_parameters(tuned).values()) == found.trainable_parameters
    x = inputs_of(name, inputs, 3, 11)
    if method not in ("prefix", "prompt", "mam"):
        torch.testing.assert_close(logits(tuned, x), logits(model, x))

    tuned.train()
    optimiser = torch.optim.AdamW(tuned_parameters(tuned).values(), lr=0.02, weight_decay=0.0)
    budget = Budget(tuned, rows, collate, objective)
    torch.manual_seed(0)
    for step in range(1, STEPS + 1):
        optimiser.zero_grad()
        out = tuned(**x).logits.square().mean()
        (out + sum(tuned.penalties.values())).backward()
        budget.before_step()
        optimiser.step()
        budget.after_step(step, STEPS, optimiser)
    before = logits(tuned, x)
    settled = settle(tuned, budget)
    if method in ("adalora", "prefix"):
        torch.testing.assert_close(logits(settled, x), before)
    assert (logits(settled, x) - logits(model, x)).abs().max() > 1e-6
    assert settled.plan.trainable_parameters == sum(p.numel() for p in tuned_parameters(settled).values())

    save_adapter(settled, tmp_path / "adapter")
    loaded = load_adapter(graph, tmp_path / "adapter")
    assert loaded.plan.to_dict() == settled.plan.to_dict()
    assert torch.equal(logits(loaded, x), logits(settled, x))
    merged = copy.deepcopy(model)
    merge(loaded, merged, partly=True)
    shipped = merged if loaded.plan.merges else rest(loaded, trace(merged, inputs, modes=("eval",)))
    stays = where == "inside" or method == "pa" or LINEAR.get(method, {}).get("mpc") == "n"
    assert loaded.plan.merges != stays
    for batch, length in ((1, 5), (4, 13)):
        x = inputs_of(name, inputs, batch, length, seed=batch)
        close = {"rtol": 1e-3, "atol": 1e-4} if name == "mixtral" else {"rtol": 1e-8, "atol": 1e-9}
        torch.testing.assert_close(logits(loaded, x), logits(shipped, x), **close)


def test_counts_of_places():
    """METHODS' closed formulas: d = 16, two layers."""
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
    options = METHODS["adalora"].options(rank=12, target_rank=4, start=0.1, end=0.3)
    ranks = [scheduled_rank(options, step, 100, 1) for step in (0, 10, 40, 70, 100)]
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


@pytest.mark.parametrize(("where", "method"), RESUMED, ids=[method for _, method in RESUMED])
def test_resume_gives_the_unbroken_result(where, method, tmp_path):
    spec = load_spec(tiny.project(tmp_path))
    rules = [rule("bert", where, method), Rule(target="classifier.*", apply=["full"])]
    train = spec.train.model_copy(update={"checkpoint_steps": 3, "checkpoint_keep": 4})
    spec = spec.model_copy(update={"rules": rules, "train": train})
    run(spec, tmp_path / "run", resume=False, overwrite=False)
    unbroken = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    plans = (tmp_path / "run" / "plan.json").read_text()
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "metrics.json").unlink()
    *_, kept, middle, last = checkpoints(tmp_path / "run" / "checkpoints")
    shutil.rmtree(middle)
    shutil.rmtree(last)
    assert kept.name == "checkpoint-6"  # where `end: 0.5` cuts
    run(spec, tmp_path / "run", resume=True, overwrite=False)
    resumed = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
    assert (tmp_path / "run" / "plan.json").read_text() == plans


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


def test_lora_plus_gives_b_a_rate_of_its_own(tmp_path):
    """After one step of AdamW, entries have moved by about their learning rate: small gradients by a little less."""
    spec = load_spec(tiny.project(tmp_path), ["train.max_grad_norm=0", "train.schedule=constant", "train.epochs=0.1"])
    step = {"lora": {"rank": 4, "ratio": 16.0}}
    rules = [Rule(target="bert.encoder.layer.*.attention.self.query.weight", apply=[step])]
    run(spec.model_copy(update={"rules": rules}), tmp_path / "run", resume=False, overwrite=False)
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    b = next(value for name, value in tensors.items() if name.endswith("layer.0.attention.self.query.weight.lora.b"))
    assert 0.9 * 16 * 1e-2 < float(b.abs().max()) <= 16 * 1e-2
