"""The loop: killed and resumed to the same bits, the best state kept, and what else a spec asks of it."""

import json
import os
import signal
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from rewriter import (
    Session,
    SpecError,
    SubspanError,
    label_weights,
    plan,
    rewrite,
    trace,
    tune,
    tuned_parameters,
)
from rewriter.files import load_tensors
from rewriter.report.table import kept
from rewriter.spec.models import SCHEDULES
from rewriter.training import loop
from rewriter.training.checkpoint import checkpoints
from rewriter.training.optimisers import OPTIMISERS, make_optimiser
from tests import tiny

STEPS = ["train.batch_size=4", "train.gradient_accumulation=2", "train.checkpoint_steps=4", "train.log_steps=3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(settings) -> a spec and what tuning it needs, with the model traced once."""
    file = tiny.project(tmp_path_factory.mktemp("project"))
    tiny.without_dropout(file.parent / "model")

    @cache
    def job():
        found = Session(file).prepare()
        return found, trace(found.pretrained.module, found.inputs)

    def make(*settings):
        spec, (found, traced) = Session(file, *settings).spec, job()
        return spec, rewrite(traced, plan(traced, spec.rules, found.pretrained.new), spec.train.seed), found

    return make


def run(made, folder, *settings, resume=False, weights=None):
    folder.mkdir(exist_ok=True)
    spec, model, job = made(*settings)
    model, metrics = tune(model, spec, job.train, job.validation, job.collate, folder, resume, weights)
    return {name: p.detach().clone() for name, p in tuned_parameters(model).items()}, metrics


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def killed(made, folder, step, *settings):
    """Run in a process of its own that is killed when it has done a step."""
    if (child := os.fork()) == 0:
        told = loop._tell

        def tell(run, report):
            told(run, report)
            if run.progress.step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        loop._tell = tell
        run(made, folder, *settings)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


OPTIONS = {
    "cosine_with_min_lr": ["min_lr=0.001"],
    "cosine_warmup_with_min_lr": ["min_lr=0.001"],
    "warmup_stable_decay": ["num_decay_steps=4"],
    "polynomial": ["power=2.0"],
    "reduce_lr_on_plateau": ["patience=0", "factor=0.5"],
}
MORE = [
    ["train.max_steps=11"],
    ["train.group_by_length=true", "train.evaluate_steps=2"],
    ["train.gradient_checkpointing=true", "train.weight_decay=0.1"],
    ["train.keep=best", "train.patience=9", "train.evaluate_steps=2", "train.checkpoint_keep=1"],
    ["train.label_smoothing=0.1", "train.max_grad_norm=0"],
]
CASES = [
    [
        f"train.optimiser={list(OPTIMISERS)[i % len(OPTIMISERS)]}",
        f"train.schedule={schedule}",
        f"train.warmup={0.0 if schedule == 'reduce_lr_on_plateau' else 0.2}",
        *(f"train.schedule_options.{option}" for option in OPTIONS.get(schedule, [])),
        *MORE[i % len(MORE)],
    ]
    for i, schedule in enumerate(SCHEDULES)
]


@pytest.mark.parametrize("settings", CASES, ids=lambda settings: f"{settings[1][15:]}-{settings[0][16:]}")
def test_killed_in_the_middle_of_an_epoch_and_resumed_to_the_same_bits(made, tmp_path, settings):
    """A step is two batches, an epoch six steps: after the tenth, it goes on from the checkpoint of the eighth."""
    settings = [*STEPS, *settings]
    whole, metrics = run(made, tmp_path / "whole", *settings)
    killed(made, tmp_path / "run", 10, *settings)
    kept = checkpoints(tmp_path / "run" / "checkpoints")
    assert kept[-1].name in ("checkpoint-8", "checkpoint-10")  # 10 if it was the best so far, and is kept as that.
    resumed, again = run(made, tmp_path / "run", *settings, resume=True)
    assert whole.keys() == resumed.keys() and all(torch.equal(resumed[name], one) for name, one in whole.items())
    for one in (metrics, again):
        assert one["train"].pop("seconds") >= 0
    assert again == metrics and log_of(tmp_path / "run") == log_of(tmp_path / "whole")


def test_what_is_measured_before_the_first_step_is_no_state_to_keep(made, tmp_path):
    """At so small a rate all evaluations are equal, and the first of them would be kept."""
    settings = [*STEPS, "train.evaluate_start=true", "train.evaluate_steps=2", "train.keep=best"]
    settings += ["train.learning_rate=1e-30"]
    metrics = run(made, tmp_path / "whole", *settings)[1]
    killed(made, tmp_path / "run", 10, *settings)
    again = run(made, tmp_path / "run", *settings, resume=True)[1]
    assert again["evaluations"] == metrics["evaluations"] and metrics["evaluations"]["best"] == 2
    assert again["before"] == metrics["before"] and log_of(tmp_path / "run") == log_of(tmp_path / "whole")


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_optimiser_s_state_is_by_name_and_as_large_as_the_plan_says(made, tmp_path, name):
    run(made, tmp_path, f"train.optimiser={name}", "train.max_steps=4")
    state = load_tensors(tmp_path / "checkpoints" / "checkpoint-4" / "optimizer.safetensors")
    _, model, _ = made()
    tuned = tuned_parameters(model)
    assert {key.split(".", 1)[0] for key in state} == {"state"}
    names = {model.root + one for one in tuned}
    assert all(any(key.startswith(f"state.{one}.") for one in names) for key in state)
    entries = sum(value.numel() for value in state.values() if value.ndim)
    assert entries == sum(OPTIMISERS[name].entries(p.shape) for p in tuned.values())


def test_decay_spares_biases_and_norms(made):
    spec, model, _ = made("train.weight_decay=0.1")
    decays = {
        id(p): group["weight_decay"]
        for group in make_optimiser(model, spec.train).param_groups
        for p in group["params"]
    }
    by_name = {name: decays[id(p)] for name, p in tuned_parameters(model).items()}
    assert {value for name, value in by_name.items() if "bias" in name} == {0.0}
    assert {value for name, value in by_name.items() if "bias" not in name} == {0.1}


def falling(monkeypatch, values):
    """Validation accuracies, one after the other, whatever the model does."""
    left, measured = iter(values), loop.predict
    monkeypatch.setattr(loop, "predict", lambda *args: ({**measured(*args)[0], "accuracy": next(left, 0.0)}, None))


def test_the_best_state_is_kept_and_said(made, tmp_path, monkeypatch):
    settings = ["train.evaluate_steps=3", "train.checkpoint_keep=1", "train.checkpoint_steps=2"]
    short, _ = run(made, tmp_path / "short", *settings, "train.schedule=constant", "train.max_steps=6")
    falling(monkeypatch, [0.5, 0.9, 0.7, 0.6])
    best, metrics = run(made, tmp_path / "best", *settings, "train.schedule=constant", "train.keep=best")
    assert metrics["evaluations"] == {"kept": 6, "best": 6, "value": 0.9} and metrics["validation"]["accuracy"] == 0.9
    assert all(torch.equal(best[name], value) for name, value in short.items())
    assert [one.name for one in checkpoints(tmp_path / "best" / "checkpoints")] == ["checkpoint-6", "checkpoint-12"]
    assert kept(metrics, "accuracy") == {"kept": "the state of step 6 of 12, the best that was evaluated (0.9000)"}
    falling(monkeypatch, [0.5, 0.9, 0.7, 0.6])
    last, metrics = run(made, tmp_path / "last", *settings, "train.schedule=constant")
    assert metrics["evaluations"] == {"kept": 12, "best": 6, "value": 0.9} and metrics["validation"]["accuracy"] == 0.6
    assert not all(torch.equal(best[name], value) for name, value in last.items())
    assert kept(metrics, "accuracy")["kept"].startswith("the last state; that of step 6 was better (0.9000)")
    falling(monkeypatch, [0.5, 0.9, 0.7, 0.9])
    _, metrics = run(made, tmp_path / "even", *settings, "train.schedule=constant")
    assert metrics["evaluations"]["best"] == 6 and kept(metrics, "accuracy") == {}


def test_it_stops_when_nothing_gets_better(made, tmp_path, monkeypatch):
    falling(monkeypatch, [0.5, 0.9, 0.7, 0.9, 0.6, 0.5])
    _, metrics = run(made, tmp_path, "train.evaluate_steps=2", "train.patience=2")
    assert metrics["train"]["steps"] == 8 and metrics["evaluations"]["best"] == 4
    assert [entry["step"] for entry in log_of(tmp_path) if "eval_loss" in entry] == [2, 4, 6, 8]


def test_accumulated_batches_are_one_large_batch(made, tmp_path):
    settings = ["train.optimiser=sgd", "train.max_steps=5", "rules.0.apply.0.lora.dropout=0.0"]
    one, _ = run(made, tmp_path / "one", *settings, "train.batch_size=16")
    four, _ = run(made, tmp_path / "four", *settings, "train.batch_size=4", "train.gradient_accumulation=4")
    for name, value in one.items():
        torch.testing.assert_close(four[name], value, rtol=1e-4, atol=1e-5)  # float32, five steps


def test_weights_of_labels(made, tmp_path):
    spec, *_ = made("train.class_weights=balanced")
    found = label_weights(spec, ["a", "b"], [10, 30])
    assert found.tolist() == [2.0, pytest.approx(2 / 3)]
    with pytest.raises(SpecError, match="no training row has the label b"):
        label_weights(spec, ["a", "b"], [10, 0])
    spec, *_ = made("train.class_weights={a: 1.0, c: 2.0}")
    with pytest.raises(SpecError, match="'c' is none of the labels a, b"):
        label_weights(spec, ["a", "b"], [])
    settings = ["train.optimiser=sgd", "train.max_steps=1", "rules.0.apply.0.lora.dropout=0.0"]
    one, _ = run(made, tmp_path / "one", *settings)
    other, _ = run(made, tmp_path / "other", *settings, weights=torch.tensor([1.0, 9.0]))
    assert not all(torch.equal(other[name], value) for name, value in one.items())


def test_batches_of_like_lengths_have_every_row_once(made, tmp_path, monkeypatch):
    spec, model, job = made("train.group_by_length=true", "train.batch_size=8")
    found = loop._begin(model, spec, job.train, job.collate, None, {}, None)
    orders = [loop._order(found, epoch) for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == list(range(len(job.train)))
    spread = [max(some) - min(some) for some in batched([found.lengths[i] for i in orders[0]], 8)]
    plain = torch.randperm(len(job.train), generator=torch.Generator().manual_seed(0)).tolist()
    assert sum(spread) <= sum(max(some) - min(some) for some in batched([found.lengths[i] for i in plain], 8))


def batched(values, size):
    return [values[i : i + size] for i in range(0, len(values), size)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.schedule_options.num_cycles=2"], "linear"),
        (["train.schedule=polynomial", "train.schedule_options.power=-5"], "polynomial: "),
        (["train.schedule=inverse_sqrt", "train.schedule_options.timescale=0"], "inverse_sqrt: "),
        (["train.schedule=constant", "train.schedule_options.power=2"], "constant has no options"),
        (["train.schedule=cosine_with_min_lr"], "train.schedule_options"),
        (["train.schedule=reduce_lr_on_plateau", "train.warmup=0.1"], "no warm-up"),
        (["train.class_weights={negative: 1.0, postive: 2.0}"], "is none of the labels"),
        (["train.track=[clearml]"], "clearml is not installed: pip install clearml"),
        (["train.keep=best", "rules.0.apply=[{adalora: {rank: 2, target_rank: 1}}]"], "keep: last"),
    ],
)
def test_what_can_t_be_tuned_is_said_before_weights_are_read(tmp_path, settings, said, monkeypatch):
    file = tiny.project(tmp_path)
    with pytest.raises(SubspanError, match=said) as caught:
        Session(file, *settings).plan()
    assert str(caught.value).startswith(("--set ", f"{file}:17:"))


def test_a_tracker_gets_the_log(made, tmp_path):
    pytest.importorskip("tensorboardX")
    run(made, tmp_path, "train.track=[tensorboard]", "train.max_steps=4")
    assert list((tmp_path / "trackers").rglob("*tfevents*"))


def test_checkpoints_are_in_the_order_of_steps(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", ".unfinished-1"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert checkpoints(tmp_path / "nowhere") == []


def test_a_checkpoint_has_no_pickle(made, tmp_path):
    run(made, tmp_path, "train.max_steps=4")
    files = sorted(one.name for one in (tmp_path / "checkpoints" / "checkpoint-4").iterdir())
    assert files == ["budget.safetensors", "optimizer.safetensors", "state.json", "tuned.safetensors"]
    assert load_file(tmp_path / "checkpoints" / "checkpoint-4" / "tuned.safetensors")
