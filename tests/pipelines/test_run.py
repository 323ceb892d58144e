"""Whole commands on a tiny model: what they write, how they fail, and that resuming gives the unbroken result."""

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
import typer
from typer.testing import CliRunner

from pipelines.data import data
from pipelines.export import export
from pipelines.passes import passes
from pipelines.plan import plan
from pipelines.push import push
from pipelines.run import run as ask
from pipelines.show import show
from pipelines.train import train
from pipelines.validate import validate
from rewriter import load_spec
from rewriter.folder import check_folder, clear, is_run
from tests.tiny import project, save_model

ROOT = Path(__file__).parents[2]
COMMANDS = {}
for command in (validate, plan, data, passes, show, train, export, ask, push):
    COMMANDS[command.__name__] = typer.Typer(pretty_exceptions_enable=False)
    COMMANDS[command.__name__].command()(command)


def call(command, *arguments):
    return CliRunner().invoke(COMMANDS[command], [str(argument) for argument in arguments])


def fails(command, *arguments, status=1):
    """The one line that a command prints on its way out."""
    result = call(command, *arguments)
    assert result.exit_code == status, (result.output, result.exception)
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output + result.stderr
    return lines[0].removeprefix("error: ")


def succeeds(command, *arguments):
    result = call(command, *arguments)
    assert result.exit_code == 0, (result.output, result.stderr, result.exception)
    return result.output


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def run(spec):
    """A finished run."""
    out = spec.parent / "run"
    succeeds("train", spec, "--out", out)
    return out


def tensors(run):
    return safetensors.torch.load_file(run / "adapter" / "adapter.safetensors")


def test_validate(spec):
    output = " ".join(succeeds("validate", spec).split())
    assert "is valid" in output and "lora(rank=4, alpha=8, dropout=0.1) " in output


def test_run_folder(run):
    plan = json.loads((run / "plan.json").read_text())
    assert plan["trainable_parameters"] == 2 * 2 * 4 * (16 + 16) and plan["head_parameters"] == 16 * 2 + 2
    assert {site["weight"] for site in plan["sites"] if site["head"]} == {"classifier.weight", "classifier.bias"}
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["train"]["steps"] == 12 and 0 <= metrics["validation"]["accuracy"] <= 1
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [2, 4, 6, 8, 10, 12]
    manifest = json.loads((run / "adapter" / "adapter.json").read_text())
    assert manifest["metrics"] == metrics and len(manifest["base"]) == 64
    assert sum(t.numel() for t in tensors(run).values()) == 512 + 34
    pickles = [path for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert not pickles
    saved = sum(path.stat().st_size for path in (run / "checkpoints" / "checkpoint-12").rglob("*"))
    assert saved < 60_000  # The model has 30 times as many bytes as the tuned tensors and their moments.


def test_export(run):
    output = succeeds("export", run, "--no-measure")
    assert "validation accuracy" in output
    report = json.loads((run / "verify.json").read_text())
    assert set(report["stages"]) == {"merged", "checkpoint", "onnx"}
    assert report["max_abs_diff"] == max(report["stages"].values()) <= 1e-5
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run / "merged")
    assert model.config.id2label == {0: "negative", 1: "positive"}
    tokens = transformers.AutoTokenizer.from_pretrained(run / "onnx")(
        ["good film", "the plot was bad and poor"], padding=True
    )
    import onnx
    import onnxruntime

    session = onnxruntime.InferenceSession(str(run / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {k: torch.tensor(v).numpy() for k, v in tokens.items()})[0]
    expected = model(**{k: torch.tensor(v) for k, v in tokens.items()}).logits.detach()
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-4, atol=1e-5)
    proto = onnx.load(run / "onnx" / "model.onnx")
    assert {p.key: p.value for p in proto.metadata_props}["labels"] == '["negative", "positive"]'
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.input}
    assert axes["input_ids"] == ["batch", "sequence"]
    assert oct((run / "adapter" / "adapter.safetensors").stat().st_mode)[-3:] == "644"


def test_a_difference_over_atol_fails_and_leaves_nothing(spec, run, tmp_path):
    broken = tmp_path / "run"
    subprocess.run(["cp", "-r", run, broken], check=True)
    for name in ("merged", "onnx", "verify.json", "export.json"):
        subprocess.run(["rm", "-rf", broken / name], check=True)
    written = (broken / "spec.yaml").read_text()
    (broken / "spec.yaml").write_text(written.replace("atol: null", "atol: 1.0e-12"))
    assert "nothing is written" in fails("export", broken)
    assert sorted(p.name for p in broken.iterdir()) == [
        ".subspan-lock",
        ".subspan-run",
        "adapter",
        "checkpoints",
        "log.jsonl",
        "metrics.json",
        "plan.json",
        "predictions.safetensors",
        "spec.yaml",
    ]


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        ("version: 1", "version: [1", "2:6", "broken YAML"),
        ("max_length: 16", "max_lenght: 16", "11:3", "did you mean 'max_length'"),
        ("rank: 4", "rank: 400", "14:27", "rank 400 is larger than bert.encoder.layer.0.attention.self.query.weight allows: it is 16 x 16"),
        ("text: text", "text: body", "10:19", "no column 'body'; the data has text, label"),
        ("[negative, positive]", "[negative]", "10:32", "holds '1'"),
        ("files: ", "files: /nowhere", "8:10", "no such file"),
        ("name: ", "name: /nowhere", "3:9", "no such folder"),
        ("apply: [full]", "apply: [ssb]", "16:13", "ssb needs a matrix"),
        ("version: 1", "a: [&a [x, x], *a]\nversion: 1", "1:1", "unknown key 'a'"),
        ("version: 1", "version: !!python/object/apply:os.system [ls]", "1:10", "is not allowed"),
    ],
)  # fmt: skip
def test_mistakes_in_a_spec(spec, tmp_path, old, new, place, message):
    """Of each part one, before anything is written; the whole list is in test_validate."""
    wrong, out = tmp_path / "wrong.yaml", tmp_path / "run"
    text = spec.read_text()
    assert old in text
    wrong.write_text(text.replace(old, new, 1))
    line = fails("train", wrong, "--out", out)
    assert message in line and line.startswith(f"{wrong}:{place}: "), line
    assert not out.exists()
    assert fails("validate", wrong) == line


def test_an_alias_bomb_is_refused(tmp_path):
    bomb = tmp_path / "bomb.yaml"
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    bomb.write_text("\n".join(levels))
    started = time.monotonic()
    assert "aliases expand" in fails("validate", bomb)
    assert time.monotonic() - started < 60


def test_settings_name_themselves(spec):
    assert fails("validate", spec, "--set", "train.epoch=3").startswith("--set train.epoch=3: ")
    assert "epochs=0" in fails("validate", spec, "--set", "train.epochs=0")
    assert "expected key=value" in fails("validate", spec, "--set", "epochs")


def test_folders_are_not_mixed_or_deleted(spec, run, tmp_path):
    assert "there is something in it" in fails("train", spec, "--out", run)
    assert "is finished" in fails("train", spec, "--out", run, "--resume")
    assert "another run" in fails("train", spec, "--out", run, "--resume", "--set", "train.epochs=3")
    (tmp_path / "mine").write_text("precious")
    assert "delete it yourself" in fails("train", spec, "--out", tmp_path, "--overwrite")
    assert (tmp_path / "mine").read_text() == "precious"
    assert "is a file" in fails("train", spec, "--out", tmp_path / "mine")


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
def test_a_project_with_its_own_spec_is_no_run(spec, tmp_path, monkeypatch, option):
    """Its files are neither deleted nor overwritten, whatever else lies there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_text("# mine\n" + spec.read_text())
    (tmp_path / "plan.json").write_text("{}")
    assert "there is something in it; choose a new folder" in fails("train", "spec.yaml", "--out", ".")
    (tmp_path / "src").mkdir()
    before = {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")}
    assert f"{option}: . is not a run" in fails("train", "spec.yaml", "--out", ".", option)
    assert {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")} == before


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(spec, run, tmp_path):
    out = tmp_path / "run"
    subprocess.run(["cp", "-r", run, out], check=True)
    mine = [out / "notes.txt", out / "adapter" / "notes.txt", out / "checkpoints" / "best" / "model"]
    mine[2].parent.mkdir()
    for file in mine:
        file.write_text("mine")
    assert is_run(out)
    (out / ".subspan-run").unlink()  # A run from before there were markers is known all the same.
    assert is_run(out)
    clear(out)
    assert sorted(path for path in out.rglob("*") if path.is_file()) == sorted(mine)
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / ".subspan-run").write_text("")
    check_folder(load_spec(spec), killed, resume=True, overwrite=False)
    check_folder(load_spec(spec), killed, resume=False, overwrite=True)
    clear(killed)
    assert not killed.exists()


def test_an_unwritable_folder(spec):
    assert "/proc/nowhere" in fails("train", spec, "--out", "/proc/nowhere")


def test_a_full_disk(spec, tmp_path):
    """A limit on the size of files stands for a disk without space."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        line = fails("train", spec, "--out", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in line
    assert not (tmp_path / "run").exists()


def test_an_adapter_for_other_weights_and_a_truncated_one(run, spec, tmp_path):
    other = save_model(tmp_path / "model", seed=1)
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", run, copy], check=True)
    written = (copy / "spec.yaml").read_text()
    (copy / "spec.yaml").write_text(written.replace(str(spec.parent / "model"), str(other)))
    assert "tuned for other base weights" in fails("export", copy)
    (copy / "spec.yaml").write_text(written)
    file = copy / "adapter" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "adapter.safetensors: truncated" in fails("export", copy)
    (copy / "adapter" / "adapter.json").write_text('{"format": 1,\n oops')
    assert "adapter.json:2:2: broken JSON" in fails("export", copy)
    assert "spec.yaml" in fails("export", tmp_path / "nowhere")


def test_a_loss_that_is_not_finite_stops_the_run(spec, tmp_path):
    out = tmp_path / "run"
    line = fails("train", spec, "--out", out, "--set", "train.learning_rate=1e30", "--set", "train.max_grad_norm=0")
    assert "--set train.learning_rate=1e30" in line and "the loss is not finite" in line
    assert not (out / "adapter").exists() and not (out / "metrics.json").exists()


def test_remote_code_runs_only_if_the_spec_says_so(spec, tmp_path):
    model = save_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    auto = {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto}))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    line = fails("validate", spec, "--set", f"model.name={model}")
    assert "trust_remote_code" in line
    assert not (tmp_path / "ran").exists()


def command_line(spec, out, *more):
    return [sys.executable, ROOT / "pipelines" / "train.py", spec, "--out", out, *more]


LONG = ["--set", "train.epochs=30", "--set", "train.weight_decay=0.01", "--set", "train.warmup=0.1"]


@pytest.fixture(scope="module")
def unbroken(spec):
    out = spec.parent / "unbroken"
    succeeds("train", spec, "--out", out, *LONG)
    return out


def test_the_model_learns(unbroken):
    assert json.loads((unbroken / "metrics.json").read_text())["validation"]["accuracy"] == 1.0


# Killed runs that go on are of test_kill too, without the command around them.
@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow), (signal.SIGINT, 130)]
)
def test_resume_gives_the_unbroken_result(spec, unbroken, tmp_path, number, status):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command_line(spec, out, *LONG), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "checkpoint-20").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert not (out / "adapter").exists()
    assert ("resume goes on" in output) == (number == signal.SIGINT) and "error" not in output
    succeeds("train", spec, "--out", out, "--resume", *LONG)
    for name, value in tensors(unbroken).items():
        assert torch.equal(tensors(out)[name], value), name
    logs = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (out, unbroken)
    ]
    losses = [[(entry["step"], entry["loss"]) for entry in log if "loss" in entry] for log in logs]
    # The mean that is logged first after a stop starts at the stop.
    assert [step for step, _ in losses[0]] == [step for step, _ in losses[1]]
    assert losses[0][20:] == losses[1][20:]
