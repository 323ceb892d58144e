"""Asking a run, its card, and what would be uploaded."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from pipelines.push import layout
from rewriter import Session
from tests.pipelines.test_run import fails, succeeds
from tests.tiny import project

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped")
    session = Session(project(folder), "train.max_steps=2")
    session.tune(folder / "run")
    session.export()
    return folder / "run"


def test_the_card_is_one_that_hubs_read(run):
    card = ModelCard.load(run / "merged" / "README.md")
    metrics = json.loads((run / "metrics.json").read_text())["validation"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", metrics["accuracy"])
    assert card.data.pipeline_tag == "text-classification" and "base_model" not in card.data.to_dict()
    assert (
        f"{metrics['accuracy']:.4f} ± 0." in card.text
        and "| onnx, in float32 | " in card.text
        and "float32" in card.text
    )
    assert str(run.parent) not in card.content
    assert (run / "onnx" / "README.md").read_text() == card.content


def test_the_layout_is_that_of_hubs(run):
    names = list(layout(run))
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "spec.yaml", "onnx/model.onnx"} <= set(
        names
    )
    assert "onnx/config.json" not in names and not any("adapter" in name for name in names)
    said = succeeds("push", run, "me/tiny", "--dry-run")
    assert all(name in said for name in names) and f"{len(names)} files" in said


def test_pushes_that_can_not_be(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "me/tiny can't be reached" in fails("push", run, "me/tiny")
    assert "owner/name" in fails("push", run, "tiny")


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"text": "a film"', "row 1 is no JSON"),
        ('{"words": ["a"]}', 'row 1 has words; sequence-classification reads {"text": "..."}'),
    ],
)
def test_questions_that_are_none(run, line, said):
    assert said in fails("run", run, line)


def test_rows_from_a_file_are_those_of_the_command_line(run, tmp_path):
    (tmp_path / "rows.txt").write_text("a good film\n\nthe plot\n")
    found = succeeds("run", run, "--file", tmp_path / "rows.txt")
    assert found == succeeds("run", run, "a good film", "", "the plot")
    answers = [json.loads(line) for line in found.splitlines()]
    assert len(answers) == 3 and all(sum(one["scores"].values()) == pytest.approx(1) for one in answers)


def test_what_is_not_there_is_said(run, tmp_path):
    spec = yaml.safe_load((run / "spec.yaml").read_text())
    assert spec["version"] == 1
    (tmp_path / "spec.yaml").write_text((run / "spec.yaml").read_text())
    (tmp_path / "metrics.json").write_text("{}")
    assert "subspan export" in fails("run", tmp_path, "a film")
