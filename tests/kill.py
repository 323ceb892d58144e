"""Processes that are killed at random while they tune and export: `python -m tests.kill --tune 50 --export 20`.

Each is a fork that SIGKILL ends at a random moment; the next one goes on. In the end there have to be the bits of a run
that nobody disturbed, and at no moment a file that looks finished and is not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from safetensors.torch import load_file

from rewriter import Session
from tests.tiny import project

SETTINGS = ("train.epochs=12", "train.checkpoint_steps=3", "train.log_steps=2", "export.onnx=null")


def killed(work: Callable[[], object], after: float) -> bool:
    """Run in a fork and kill it after so many seconds; whether it was still at work."""
    if (child := os.fork()) == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + after
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "it failed"
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def whole(run: Path) -> None:
    """Every file that has its final name can be read."""
    for file in run.rglob("*"):
        if ".unfinished-" in str(file) or not file.is_file():
            continue
        if file.suffix == ".safetensors":
            load_file(file)
        elif file.suffix == ".json":
            json.loads(file.read_text())
    if (run / "verify.json").exists():
        assert (run / "merged" / "model.safetensors").exists()


def result(run: Path) -> dict[str, object]:
    """What has to be the same, to the bit; times apart."""
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["train"].pop("seconds")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {"adapter": (run / "adapter" / "adapter.safetensors").read_bytes(), "metrics": metrics, "log": log}


def tuning(folder: Path, kills: int, seed: int = 0) -> int:
    """Tune under fire until so many were killed; how many runs came to their end in between."""
    spec, run, draw = folder / "spec.yaml", folder / "run", random.Random(seed)
    start = time.monotonic()
    Session(spec, *SETTINGS).tune(folder / "calm")
    length, expected, ends, count = time.monotonic() - start, result(folder / "calm"), 0, 0
    while count < kills or ends == 0:
        work = lambda: Session(spec, *SETTINGS).tune(run, resume=run.exists() and any(run.iterdir()))  # noqa: E731
        if killed(work, draw.uniform(0, length) if count < kills else 600):
            count += 1
            whole(run)
        else:
            ends += 1
            assert result(run) == expected
            shutil.rmtree(run)
    return ends


def exporting(folder: Path, kills: int, seed: int = 0) -> int:
    """Export under fire; how many exports came to their end."""
    run, draw = folder / "calm", random.Random(seed)
    start = time.monotonic()
    Session(run / "spec.yaml").export(run)
    length, ends, count = time.monotonic() - start, 0, 0
    expected = {file.name: file.read_bytes() for file in (run / "merged").iterdir() if file.is_file()}
    while count < kills or ends == 0:
        if killed(lambda: Session(run / "spec.yaml").export(run), draw.uniform(0, length) if count < kills else 600):
            count += 1
            whole(run)
        else:
            ends += 1
        if (run / "merged").exists():
            assert {file.name: file.read_bytes() for file in (run / "merged").iterdir() if file.is_file()} == expected
    assert not killed(lambda: Session(run / "spec.yaml").export(run), 600) and (run / "verify.json").exists()
    assert not list(run.rglob(".unfinished-*"))
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", type=int, default=50)
    parser.add_argument("--export", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        project(Path(place))
        ends = tuning(Path(place), given.tune, given.seed)
        print(f"{given.tune} kills while tuning: {ends} runs came to their end, each with the same bits")
        ends = exporting(Path(place), given.export, given.seed)
        print(f"{given.export} kills while exporting: {ends} came to their end, nothing mixed")


if __name__ == "__main__":
    main()
