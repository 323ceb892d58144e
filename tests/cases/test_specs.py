"""Specs that used to end in a traceback, in minutes, or in something else than they say."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.cells import folder_of
from pipelines.results import draw
from pipelines.validate import Format, Level, check_all
from rewriter import Session, SubspanError, load_specs
from tests.tiny import project


def said(file, change, level=Level.plan):
    """What validate says of the spec with a part of its text replaced, and how long it takes."""
    text = file.read_text()
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new, 1)
    other = file.with_name("changed.yaml")
    other.write_bytes(text.encode())
    start = time.monotonic()
    found = [
        str(one)
        for result in check_all([other], [], level, Format.json)
        for one in result["findings"]
        if one.kind != "warning"
    ]
    assert time.monotonic() - start < 10
    return "\n".join(found).replace(str(file.parent), "")


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return project(tmp_path_factory.mktemp("spec"))


DEEP = "{a: " * 300 + "1" + "}" * 300
CASES = {
    "49-deep": ({"  task:": f"  config: {DEEP}\n  task:"}, "/changed.yaml:4:203: nested more than 50 deep"),
    "49-deep-list": ({"  task:": f"  config: {'[' * 300}1{']' * 300}\n  task:"}, "nested more than 50 deep"),
    "49-hex": ({"epochs: 2": "epochs: 0x" + "f" * 6000}, "/changed.yaml:17:17: a number of more than 64 bits"),
    "49-digits": ({"batch_size: 8": "batch_size: " + "9" * 5000}, "can't be read as int"),
    "49-bool": ({"epochs: 2": "epochs: !!bool abc"}, "/changed.yaml:17:17: 'abc' can't be read as bool"),
    "49-float": ({"epochs: 2": "epochs: !!float abc"}, "/changed.yaml:17:17: 'abc' can't be read as float"),
    "49-share": ({"validation: 16": "validation: 0.999999"}, "data.split.validation: a share of 0.999999 of 64 rows leaves none to train on"),
    "49-user": ({"  name: ": "  name: ~nosuchuser"}, "starts with a home folder that there is not"),
    "49-user-data": ({"  files: ": "  files: ~nosuchuser"}, "data.files: '~nosuchuser"),
    "49-nul": ({"  name: ": '  name: "package://rewriter/a\\0b" #'}, "holds a NUL, which no path does"),
    "49-nul-data": ({"  files: ": '  files: "/tmp/a\\0b" #'}, "data.files: '/tmp/a\\x00b' holds a NUL"),
    "50-inf": ({"alpha: 8": "alpha: .inf"}, "rules[0].apply[0].lora.alpha: should be a finite number"),
    "50-nan": ({"alpha: 8": "alpha: .nan"}, "rules[0].apply[0].lora.alpha: should be a finite number"),
    "50-target": ({'target: "classifier.*"': "target: []"}, "rules[1].target: "),
    "50-empty": ({'target: "classifier.*"': "target: ''"}, "rules[1].target: "),
    "50-values": ({"train:": "variants: [{values: {rank: []}}]\ntrain:"}, "variants[0].values: its lists are empty"),
    "51-flat": ({"train:": f"meta: {{x: [{'1, ' * 1_700_000}1]}}\ntrain:"}, "larger than 2,000,000 characters"),
    "51-list": ({"train:": f"meta: {{x: [{'1, ' * 300_000}1]}}\ntrain:"}, "more than 50,000 values"),
    "51-keys": ({"train:": "meta:\n" + "".join(f"  k{i}: 1\n" for i in range(90_000)) + "train:"}, "more than 50,000 values"),
    "51-layers": ({"  task:": "  config: {model_type: bert, num_hidden_layers: 10000000}\n  task:"}, "num_hidden_layers: 10000000 is more layers than any model has"),
    "51-decoder": ({"  task:": "  config: {model_type: bart, decoder_layers: 99999}\n  task:"}, "decoder_layers: 99999 is more layers"),
    "63-key": ({"train:": '"\\e[31mkey": 1\ntrain:'}, "unknown key '\\x1b[31mkey'"),
    "63-label": ({"[negative, positive]": '["\\e[2J", b]', "label: label": "label: text"}, "one of the labels \\x1b[2J, b"),
    "68-epochs": ({"epochs: 2": "epochs: 1e308"}, "train.epochs: should be less than or equal to 1000000"),
    "68-streaming": ({"  columns:": "  options: {streaming: true}\n  columns:"}, "csv has no option 'streaming'"),
    "68-dict-labels": ({"labels: [negative, positive]": "labels: {a: 1}"}, "model.labels: should be a valid list"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_line_with_a_place(spec, name):
    change, words = CASES[name]
    found = said(spec, change)
    assert words in found and "unexpected" not in found
    assert found.startswith("/changed.yaml:") and "\x1b" not in found and len(found.splitlines()) == 1


@pytest.mark.parametrize("name", ["/../../x", "..", "a/b", "."], ids="61-{}".format)
def test_61_a_study_writes_inside_its_folder(tmp_path, name):
    numbers = {"trainable_parameters": 3, "head_parameters": 0, "total_parameters": 9, "trainable_thousandths": 1.0}
    numbers |= {"value": 0.5, "loss": 1.0, "rows": 4, "seconds": 1.0, "peak_bytes": 1}
    record = {"study": name, "row": "r", "seed": 0, "state": "COMPLETE", "metric": "accuracy", "error": None, **numbers}
    (tmp_path / "to").mkdir()
    draw(name, [record], tmp_path / "to")
    assert {file.parent for file in tmp_path.rglob("*.svg")} == {tmp_path / "to"}
    assert folder_of(tmp_path, f"{name}/row/0").resolve().is_relative_to(tmp_path / "cells")


def test_48_two_processes_speak_once(tmp_path):
    """The main one writes and speaks; another that comes late finds nothing amiss."""
    spec, out = project(tmp_path), tmp_path / "run"
    script = tmp_path / "late.py"
    script.write_text(
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1':\n    time.sleep(3)\n"
        "from pipelines.train import train\nimport typer\ntyper.run(train)\n"
    )
    command = [
        "torchrun",
        "--nproc-per-node=2",
        "--master-port=0",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        str(script),
    ]
    settings = ["--set", "train.max_steps=4", "--set", "train.log_steps=2", "--set", "export.onnx=null"]
    env = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    run = [str(Path(sys.executable).with_name(command[0])), *command[1:], str(spec), "--out", str(out), *settings]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("step 2/4") == 1 and done.stdout.count("step 4/4  loss") == 1
    assert (out / "adapter").is_dir() and len((out / "log.jsonl").read_text().splitlines()) == 3


def test_68_what_training_would_say_is_said_by_validate(spec):
    """Of labels that are lists: a plan with data on disk reads them."""
    file = spec.with_name("lists.jsonl")
    file.write_text('{"text": "good", "label": [0, 1]}\n' * 40)
    found = said(spec, {"format: csv": "format: json", str(spec.with_name("data.csv")): str(file)})
    assert (
        "does not hold one label a row, as sequence-classification reads; a task that reads it: multi-label-classification"
        in found
    )


def test_a_variant_without_values_is_one(spec):
    assert len(load_specs(spec)) == 1
    with pytest.raises(SubspanError, match="expected key=value"):
        Session(spec, "x")
