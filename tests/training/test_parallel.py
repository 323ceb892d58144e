"""Two processes under torchrun: the result of one, one set of files, also when one of them is late."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rewriter import Session
from tests import tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# Late before everything, and before every second step.
SCRIPT = """
import os, sys, time
late = float(os.environ["LATE"]) if os.environ.get("RANK") == "1" else 0.0
time.sleep(10 * late)
from rewriter.training import loop
told = loop._step
def step(run, *rest):
    time.sleep(late * (run.progress.step % 2))
    return told(run, *rest)
loop._step = step
from pipelines.train import train
import typer
sys.argv = ["train.py", *sys.argv[1:]]
typer.run(train)
"""
SETTINGS = ["train.label_smoothing=0.1", "train.evaluate_steps=4", "rules.0.apply=[{lora: {rank: 4}}]"]
# 48 rows in batches of 10, two to a step: the last batch of an epoch has 8, the last step one batch.
SETTINGS += ["train.log_steps=3", "train.batch_size=10", "train.gradient_accumulation=2", "train.group_by_length=true"]


def torchrun(spec, out, *more, late=0.0):
    script = spec.parent / "script.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LATE": str(late), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *launch, str(spec), "--out", str(out), *more]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240)


def files(run):
    return sorted(str(one.relative_to(run)) for one in run.rglob("*") if one.is_file())


def test_two_processes_give_the_result_of_one(tmp_path):
    """Sums are in another order: float32 over six steps, within 1e-5."""
    spec = tiny.project(tmp_path)
    tiny.without_dropout(tmp_path / "model")
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    Session(spec, *SETTINGS).tune(tmp_path / "one")
    done = torchrun(spec, tmp_path / "two", *settings, late=0.2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("export it") == 1 and done.stdout.count("eval_loss") == 2
    assert files(tmp_path / "two") == files(tmp_path / "one")
    one, two = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two["validation"]["accuracy"] == one["validation"]["accuracy"]
    assert abs(two["validation"]["loss"] - one["validation"]["loss"]) < 1e-5
    assert abs(two["train"]["loss"] - one["train"]["loss"]) < 1e-5
    log = (tmp_path / "two" / "log.jsonl").read_text()
    # And goes on, to the same bits, from what two processes wrote.
    for name in ("adapter/adapter.safetensors", "metrics.json", "adapter/adapter.json"):
        (tmp_path / "two" / name).rename(tmp_path / name.replace("/", "-"))
    for path in (tmp_path / "two" / "checkpoints" / "checkpoint-6").iterdir():
        path.unlink()
    (tmp_path / "two" / "checkpoints" / "checkpoint-6").rmdir()
    done = torchrun(spec, tmp_path / "two", "--resume", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    before = load_file(tmp_path / "adapter-adapter.safetensors")
    after = load_file(tmp_path / "two" / "adapter" / "adapter.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert (tmp_path / "two" / "log.jsonl").read_text() == log


def test_a_batch_that_can_t_be_shared_is_refused(tmp_path):
    spec = tiny.project(tmp_path)
    done = torchrun(spec, tmp_path / "run", "--set", "train.batch_size=9")
    assert done.returncode == 1
    said = [one for one in done.stderr.splitlines() if one.startswith("error: ")]
    assert said == ["error: --set train.batch_size=9: train.batch_size: 2 processes can't share 9 rows equally"]
    assert not (tmp_path / "run").exists()
