"""Killed at random, and on a disk that fills: nothing is lost, nothing is mixed. `python -m tests.kill` does more of it."""

import os
import resource
import signal

import pytest
import torch

from rewriter import Session
from tests import kill
from tests.tiny import project

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a fork can't use CUDA")


def test_killed_at_random(tmp_path):
    Session(project(tmp_path)).shapes(whole=True)  # How long a run takes is measured without its first trace.
    assert kill.tuning(tmp_path, 3) >= 1
    assert kill.exporting(tmp_path, 2) >= 1


def limited(work, size):
    """Run in a fork that can write no file of more than so many bytes, as on a disk that is full; what it raised."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        said = "nothing"
        try:
            work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    return os.read(reading, 10_000).decode()


@pytest.mark.parametrize("size", [0, 9_000])
def test_a_disk_that_fills(tmp_path, size):
    """Whatever can't be written any more: one error of the system, and the run goes on to the same bits."""
    spec, settings = project(tmp_path), kill.SETTINGS
    Session(spec, *settings).tune(tmp_path / "calm")
    run, calm = tmp_path / "run", tmp_path / "calm"
    said = limited(lambda: Session(spec, *settings).tune(run), size)
    assert said == "nothing" or said.startswith("OSError: "), said
    if run.exists():
        kill.whole(run)
    if said != "nothing":
        Session(spec, *settings).tune(run, resume=run.exists())
    assert kill.result(run) == kill.result(calm)
    said = limited(lambda: Session(calm / "spec.yaml").export(calm), size)
    assert said == "nothing" or said.startswith("OSError: "), said
    kill.whole(calm)
    assert (calm / "verify.json").exists() == (said == "nothing")
