"""Frozen weights shared out among processes: what each holds, and the results of one process that has them whole."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rewriter import Session, SubspanError
from tests import tiny
from tests.tasks.test_preference import written

ROOT = Path(__file__).parents[2]
HOLD = """
import os, sys, torch
from torch import nn
from accelerate import PartialState
from rewriter.algebra import Format, Quantised, held_bytes
from rewriter.training.sharding import Sharded, shard
state = PartialState(cpu=True)
torch.manual_seed(0)
linear, table, few = nn.Linear(70, 33), nn.Embedding(31, 33), nn.Linear(64, 33, bias=False)
few.weight = nn.Parameter(Quantised.of(few.weight, Format("int4", 32)), False)
model = nn.ModuleDict({"linear": linear, "table": table, "few": few}).requires_grad_(False)
whole = {name: (one.dense() if isinstance(one, Quantised) else one.clone()) for name, one in model.named_parameters()}
bytes_before = {name: held_bytes(one) for name, one in model.named_parameters()}
x, ids, y = torch.randn(5, 70, requires_grad=True), torch.tensor([[3, 30]]), torch.randn(2, 64)
def results():
    x.grad = None
    found = linear(x)
    found.square().sum().backward()
    return found.detach(), x.grad.clone(), table(ids), few(y)
before = results()
shard(2, (model,), ())
for name, one in model.named_parameters():
    assert isinstance(one, Sharded) == (one.numel() >= 256), name
    if isinstance(one, Sharded):
        assert held_bytes(one) <= bytes_before[name] * 17 / 32, (name, held_bytes(one), bytes_before[name])
        assert torch.equal(one.dense(), whole[name]) and one.shape == whole[name].shape
kept = []
with torch.autograd.graph.saved_tensors_hooks(lambda one: (kept.append(one), one)[1], lambda one: one):
    linear(x)
assert any(isinstance(one, Sharded) for one in kept)
assert all(torch.equal(a, b) for a, b in zip(before, results()))
print("held")
torch.distributed.destroy_process_group()
"""
GATHER = """
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from accelerate import PartialState
from rewriter.training.sharding import shard
state = PartialState(cpu=True)
torch.manual_seed(0)
wide = [nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) for _ in range(3)]
model = nn.ModuleDict({"table": nn.Embedding(40, 32), "layers": nn.Sequential(*wide)}).requires_grad_(False)
ids, scale = torch.arange(8), torch.ones(32, requires_grad=True)
def step():
    scale.grad = None
    model["layers"](model["table"](ids) * scale).square().sum().backward()
    return scale.grad.clone()
before, whole = step(), [one[0].weight.clone() for one in wide]
shard(2, (model,), ())
with profile(activities=[ProfilerActivity.CPU]) as seen:
    after = step()
assert torch.equal(before, after)
counts = {one.key: one.count for one in seen.key_averages()}
assert counts["c10d::_allgather_base_"] == 6, counts
rows, own = wide[0][0].weight[3:5], wide[1][0].weight.dense()
both = torch.cat([wide[0][0].weight, wide[2][0].weight])
step()
assert torch.equal(rows, whole[0][3:5]) and torch.equal(own, whole[1])
assert torch.equal(both, torch.cat([whole[0], whole[2]]))
print("gathered")
torch.distributed.destroy_process_group()
"""
SETTINGS = ["train.batch_size=10", "train.gradient_accumulation=2", "train.checkpoint_steps=1", "train.epochs=3"]
METHODS = {
    "lora": "[{lora: {rank: 4}}]",
    "adalora": "[{adalora: {rank: 4, interval: 1}}]",
    "fish_mask": "[{fish_mask: {density: 0.1}}]",
}
slow = pytest.mark.slow


def launched(count, *line):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *line]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        launch, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def done(process):
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    return said


def workers_of(process):
    """The processes that a launcher has started, in order."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return sorted(map(int, found.split()))


def test_each_process_holds_its_part_and_computes_the_same(tmp_path):
    (tmp_path / "hold.py").write_text(HOLD)
    assert done(launched(2, str(tmp_path / "hold.py"))).count("held") == 2


def test_a_layer_is_gathered_once_in_each_direction_and_what_was_read_of_it_stays(tmp_path):
    """The table and three layers in the forward; two in the backward, since the last one is there still."""
    (tmp_path / "gather.py").write_text(GATHER)
    assert done(launched(2, str(tmp_path / "gather.py"))).count("gathered") == 2


@pytest.mark.parametrize(
    ("setting", "said"),
    [("train.parallel.shard=2", "1 processes are not groups of 2"), ("train.parallel.data=3", "are not 3 groups of 1")],
)
def test_groups_that_do_not_fit_are_refused(tmp_path, setting, said):
    with pytest.raises(SubspanError, match=said):
        Session(tiny.project(tmp_path), setting).tune(tmp_path / "run")


def settings_of(method, shard):
    return [*SETTINGS, f"rules.0.apply={METHODS[method]}", f"train.parallel.shard={shard}"]


def command(folder, out, method, shard, *more):
    settings = settings_of(method, shard)
    line = [str(ROOT / "pipelines/train.py"), str(folder / "spec.yaml"), "--out", str(out), *more]
    return [*line, *(part for setting in settings for part in ("--set", setting))]


def apart(one, other):
    """The largest difference of adapters, and of what a run said of each step and in the end."""
    tensors = [load_file(run / "adapter/adapter.safetensors") for run in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    found = [float((tensors[0][name].double() - tensors[1][name].double()).abs().max()) for name in tensors[0]]
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, other)]
    found += [abs(a[key] - b[key]) for a, b in zip(*logs, strict=True) for key in a if key.endswith("loss")]
    ends = [json.loads((run / "metrics.json").read_text())["validation"]["loss"] for run in (one, other)]
    return max(*found, abs(ends[0] - ends[1]))


@slow
@pytest.mark.parametrize(("method", "shard"), [("lora", 1), ("adalora", 2), ("fish_mask", 2)])
def test_a_run_of_two_is_that_of_one_also_when_one_of_them_is_killed(tmp_path, method, shard):
    """48 rows in batches of 10, two to a step: some steps have a batch that one process has no row of. Float32, sums in
    another order: 1e-5."""
    tiny.project(tmp_path)
    tiny.without_dropout(tmp_path / "model")
    alone = Session(tmp_path / "spec.yaml", *settings_of(method, 1))
    alone.tune(tmp_path / "one")
    done(launched(2, *command(tmp_path, tmp_path / "two", method, shard)))
    assert apart(tmp_path / "one", tmp_path / "two") < 1e-5
    process = launched(2, *command(tmp_path, tmp_path / "killed", method, shard))
    places, until = tmp_path / "killed/checkpoints", time.monotonic() + 120
    while not (places.is_dir() and any(places.iterdir())) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    assert process.wait(timeout=120)
    assert not (tmp_path / "killed/metrics.json").exists()
    for count, own in ((1, 1), (2, shard)):
        out = tmp_path / f"again-{count}"
        subprocess.run(["cp", "-r", str(tmp_path / "killed"), str(out)], check=True)
        if count == 2:
            done(launched(2, *command(tmp_path, out, method, own, "--resume")))
        else:
            alone.tune(out, resume=True)
        assert apart(tmp_path / "one", out) < 1e-5


@slow
def test_pairs_are_read_beside_a_model_that_is_shared_out(tmp_path):
    """The reference of 24 and of 8 pairs in batches of 10: three batches and one, for two processes."""
    spec = written(tmp_path)
    alone = Session(spec, "train.batch_size=10")
    alone.tune(tmp_path / "one")
    line = [str(ROOT / "pipelines/train.py"), str(spec), "--out", str(tmp_path / "two")]
    done(launched(2, *line, "--set", "train.batch_size=10", "--set", "train.parallel.shard=2"))
    assert apart(tmp_path / "one", tmp_path / "two") < 1e-5


def test_what_is_written_is_not_shared_out(tmp_path):
    spec = tiny.project(tmp_path)
    text = (
        spec.read_text().replace("sequence-classification", "causal-lm").replace("  labels: [negative, positive]\n", "")
    )
    spec.write_text(text.replace("{text: text, label: label}", "{prompt: text, completion: label}"))
    with pytest.raises(SubspanError, match="what is written differs in length"):
        Session(spec, "train.parallel.shard=2", "train.generate={}")
