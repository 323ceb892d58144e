"""A study: killed and shared, it finishes every cell once; the report says what came out, failures too."""

import contextlib
import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from typer.testing import CliRunner

from pipelines import cells, results, study
from rewriter import load_spec
from tests import tiny

pytestmark = pytest.mark.slow

RULES = """\
variants:
  - values: {row: [lora, ssb, broken], step: [{lora: {rank: 2}}, ssb, {lora: {rank: 99}}]}
    meta: {row: $row}
    rules:
      - {target: "bert.encoder.layer.*.attention.self.{query,value}.weight", apply: [$step]}
      - {target: "classifier.*", apply: [full]}
"""
# Heartbeats a second apart, so that the test need not wait long for a dead process to be noticed.
COMMAND = "import pipelines.cells as c, pipelines.study as s; c.HEARTBEAT, c.GRACE = 1, 4; s.app()"


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    spec = tiny.project(tmp_path_factory.mktemp("project"))
    before, _, after = spec.read_text().partition("rules:")
    settings = after[after.index("train:") :].replace("checkpoint_steps: 4", "checkpoint_steps: 1")
    file = spec.parent / "tiny.yaml"
    file.write_text(before + settings + RULES)
    return file


SET = ["--set", "train.learning_rate=0.02"]


def start(spec, out, *rows, more=()):
    picked = [*SET, *(part for row in rows for part in ("--row", row))]
    arguments = ["run", str(spec), "--out", str(out), "--seed", "0", "--seed", "1", *picked, *more]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def trials(out):
    return optuna.load_study(study_name="study", storage=f"sqlite:///{out / 'study.db'}").get_trials()


def test_killed_and_shared_every_cell_is_done_once(spec, tmp_path):
    out = tmp_path / "study"
    first = start(spec, out, "lora", "ssb")
    deadline = time.monotonic() + 120
    while (
        len(list(out.glob("cells/*/*/*/checkpoints/checkpoint-*"))) < 2
        and first.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    finished = {file: file.stat().st_mtime_ns for file in out.glob("cells/*/*/*/metrics.json")}
    assert len(finished) < 4
    both = [start(spec, out, "lora", "ssb") for _ in range(2)]
    printed = [process.communicate(timeout=240)[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert all(file.stat().st_mtime_ns == when for file, when in finished.items())
    done = [trial for trial in trials(out) if trial.state == optuna.trial.TrialState.COMPLETE]
    assert sorted(trial.user_attrs["cell"] for trial in done) == [
        f"tiny/{row}/{seed}" for row in ("lora", "ssb") for seed in (0, 1)
    ]
    again = CliRunner().invoke(study.app, ["run", str(spec), "--out", str(out), "--row", "lora", "--seed", "0", *SET])
    assert again.exit_code == 0 and len(trials(out)) == len([t for t in trials(out) if t.state.is_finished()])
    assert len([t for t in trials(out) if t.state == optuna.trial.TrialState.COMPLETE]) == 4


POSTGRES = shutil.which("postgres") or next(iter(glob.glob("/usr/lib/postgresql/*/bin/postgres")), None)


@pytest.fixture
def server():
    """A PostgreSQL server of its own; it does not run as root."""
    if POSTGRES is None:
        pytest.skip("there is no PostgreSQL here")
    place = Path(tempfile.mkdtemp(prefix="subspan-postgres-"))
    other = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
    if other:
        shutil.chown(place, "postgres", "postgres")
    initdb = str(Path(POSTGRES).resolve().with_name("initdb"))
    line = [initdb, "-D", str(place / "data"), "-U", "me", "--auth=trust", "--no-sync"]
    subprocess.run(line, check=True, capture_output=True, cwd=place, **other)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [POSTGRES, "-D", str(place / "data"), "-p", str(port), "-k", str(place), "-c", "listen_addresses=127.0.0.1"]
    process = subprocess.Popen(line, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **other)
    url, until = f"postgresql://me@127.0.0.1:{port}/postgres", time.monotonic() + 60
    import psycopg

    while time.monotonic() < until:
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(url):
            break
        time.sleep(0.1)
    yield url
    process.send_signal(signal.SIGINT)  # At once, whoever is connected still.
    process.wait(timeout=60)
    shutil.rmtree(place)


def test_two_machines_share_the_cells_of_a_server_and_one_of_them_dies(spec, tmp_path, server):
    """Each has a folder of its own. The one that is killed has done a cell and begun another, which is done again."""
    outs, more = [tmp_path / "one", tmp_path / "other"], ["--storage", server]
    both = [start(spec, out, "lora", "ssb", more=more) for out in outs]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        done, begun = (len(list(outs[0].glob(f"cells/*/*/*/{name}"))) for name in ("metrics.json", "spec.yaml"))
        if done >= 1 and begun > done:
            break
        time.sleep(0.02)
    os.kill(both[0].pid, signal.SIGKILL)
    both[0].wait()
    printed = both[1].communicate(timeout=240)[0].decode()
    assert both[1].returncode == 0, printed
    url = server.replace("postgresql://", "postgresql+psycopg://")
    known = optuna.load_study(study_name="study", storage=url).get_trials()
    done = [trial for trial in known if trial.state == optuna.trial.TrialState.COMPLETE]
    assert sorted(trial.user_attrs["cell"] for trial in done) == [
        f"tiny/{row}/{seed}" for row in ("lora", "ssb") for seed in (0, 1)
    ]
    assert not (tmp_path / "other" / "study.db").exists()
    told = CliRunner().invoke(study.app, ["report", "--out", str(outs[1]), "--to", str(tmp_path / "docs"), *more])
    assert told.exit_code == 0, told.output
    assert len(json.loads((tmp_path / "docs/results.json").read_text())) == 4


@pytest.mark.parametrize("shared", [False, True])
def test_processes_that_begin_a_study_at_once_make_it_once(tmp_path, shared, request):
    """Eight look for its tables while there are none: each makes what it does not see."""
    url = request.getfixturevalue("server") if shared else None
    with ThreadPoolExecutor(8) as pool:
        studies = list(pool.map(lambda _: cells.open_study(tmp_path, url), range(8)))
    studies[0].enqueue_trial({}, user_attrs={"cell": "tiny/lora/0"})
    assert [len(one.get_trials()) for one in studies] == [1] * 8


@pytest.mark.parametrize(
    ("url", "said"),
    [("mysql://x/y", "is named postgresql://"), ("postgresql://me@127.0.0.1:9/none", "can't be reached")],
)
def test_a_server_that_is_none_is_said(spec, tmp_path, url, said):
    run = CliRunner().invoke(study.app, ["run", str(spec), "--out", str(tmp_path / "study"), "--storage", url])
    assert run.exit_code == 1 and said in " ".join(run.output.split())


def test_a_study_is_planned_before_it_is_run(spec):
    """48 training rows in batches of 8, two epochs: 12 steps."""
    run = CliRunner().invoke(
        study.app, ["plan", str(spec), "--row", "lora", "--row", "ssb", "--seed", "0", "--seed", "1", *SET]
    )
    assert run.exit_code == 0, run.output
    assert "4 cells, 48 steps" in run.output and "tiny/lora" in run.output


def test_rows_that_there_are_not_are_said(spec, tmp_path):
    run = CliRunner().invoke(study.app, ["run", str(spec), "--out", str(tmp_path), "--row", "lora", "--row", "nope"])
    assert run.exit_code == 1 and "--row nope: there is none; the specs have lora, ssb, broken" in run.output


def test_interrupted_it_goes_on(spec, tmp_path):
    out = tmp_path / "study"
    first = start(spec, out, "lora")
    deadline = time.monotonic() + 120
    while (
        not list(out.glob("cells/*/*/*/checkpoints/checkpoint-*"))
        and first.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    printed = first.communicate(timeout=60)[0].decode()
    assert first.returncode == 130, printed
    run = CliRunner().invoke(
        study.app, ["run", str(spec), "--out", str(out), "--row", "lora", "--seed", "0", "--seed", "1", *SET]
    )
    assert all(load_spec(file).train.learning_rate == 0.02 for file in out.glob("cells/*/*/*/spec.yaml"))
    assert run.exit_code == 0, run.output
    assert [cells.latest(cells.open_study(out))[f"tiny/lora/{seed}"].state.name for seed in (0, 1)] == ["COMPLETE"] * 2


def test_a_failed_cell_is_marked(spec, tmp_path):
    out, docs = tmp_path / "study", tmp_path / "docs"
    run = CliRunner().invoke(study.app, ["run", str(spec), "--out", str(out), "--row", "lora", "--row", "broken"])
    assert run.exit_code == 1 and "rank 99 is larger" in run.output
    count = len(trials(out))
    again = CliRunner().invoke(study.app, ["run", str(spec), "--out", str(out), "--row", "broken"])
    assert again.exit_code == 1 and len(trials(out)) == count
    retried = CliRunner().invoke(study.app, ["run", str(spec), "--out", str(out), "--row", "broken", "--retry"])
    assert retried.exit_code == 1 and len(trials(out)) == count + 1
    other = CliRunner().invoke(study.app, ["run", str(spec), "--out", str(out), "--set", "train.epochs=9"])
    assert other.exit_code == 1 and "its run has nothing set; give another --name" in other.output
    named = ["--row", "broken", "--set", "train.epochs=9", "--name", "long"]
    other = CliRunner().invoke(study.app, ["run", str(spec), "--out", str(out), *named])
    assert other.exit_code == 1 and "failed: long/broken/0: " in other.output
    report = CliRunner().invoke(study.app, ["report", "--out", str(out), "--to", str(docs)])
    assert report.exit_code == 0, report.output
    page = (docs / "results.md").read_text()
    assert "| broken | | | **1 failed** | | 0 | | |" in page and "| lora | 256 | " in page
    records = json.loads((docs / "results.json").read_text())
    assert [record["value"] is None for record in records] == [False, True, True] and records[0]["peak_bytes"] > 10**8
    ET.parse(docs / "tiny.svg")
    assert (docs / "tiny.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(docs.glob(".*"))
    again = CliRunner().invoke(
        study.app, ["report", "--out", str(docs / "results.json"), "--to", str(tmp_path / "two")]
    )
    assert again.exit_code == 0, again.output
    for file in docs.iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file


def test_the_documents_are_made_of_the_records():
    docs = Path(__file__).parents[2] / "docs"
    assert results.page(json.loads((docs / "results.json").read_text())) == (docs / "results.md").read_text()


def records(**values):
    common = {
        "metric": "accuracy",
        "trainable_parameters": 10,
        "total_parameters": 1000,
        "rows": 100,
        "loss": 0.5,
        "seconds": 1.0,
        "peak_bytes": 1,
    }
    return [
        {"study": "s", "row": row, "seed": seed, "value": value, "error": None, **common}
        for row, many in values.items()
        for seed, value in enumerate(many)
    ]


def test_folders_of_cells_are_apart_and_inside(tmp_path):
    names = ["t/a b/0", "t/a_b/0", "t/../0", "t/../../x/0", "../a b/0", "t/a b/1", "t/a+b/0", "t/a/b/0", "t/a%2Fb/0"]
    folders = {cells.folder_of(tmp_path, cell) for cell in names}
    assert len(folders) == len(names)
    assert all(folder.resolve().parents[2] == tmp_path / "cells" for folder in folders)


def test_numbers_of_a_summary():
    first, second = results.summaries(records(ssl=[0.5, 0.7], ssb=[0.8, None]))
    assert (first["row"], first["mean"], first["seeds"], first["failed"], first["deviation"]) == (
        "ssb",
        0.8,
        1,
        1,
        None,
    )
    assert second["mean"] == pytest.approx(0.6) and second["deviation"] == pytest.approx(0.1 * 2**0.5)
    assert first["share"] == 10.0


def test_claims_are_counted():
    page = results.page(records(ssb=[0.8], ssl=[0.7], ia3=[0.81], lora=[0.5, 0.7], **{"head alone": [0.75]}))
    error = (0.8 * 0.2 / 100 + 0.7 * 0.3 / 100) ** 0.5
    assert f"| ssb > ssl | yes | +0.1000 ± {error:.4f} | no |" in page
    assert "| ssb > ia3 | no, within the error | -0.0100 ± " in page
    assert "Below the head alone (0.7500): ssl, lora." in page


def test_a_study_without_differences_says_so():
    page = results.page(records(ssb=[0.8], ssl=[0.8]))
    assert "Every row ends with the same value" in page and "| ssb > ssl | no, within the error | +0.0000 ± " in page


def test_error_over_seeds_and_peft_beside():
    page = results.page(records(**{"trilora": [0.8, 0.9], "lora": [0.5, 0.7], "lora of PEFT": [0.6, 0.61]}))
    assert f"| trilora > lora | yes | +0.2500 ± {(0.05**2 + 0.1**2) ** 0.5:.4f} | no |" in page
    assert "PEFT's lora on the same setting: 0.6050, -0.0050 from ours." in page
