"""The commands plan and show on a tiny project."""

import pytest

from pipelines.plan import difference
from rewriter import Session
from tests import tiny
from tests.pipelines.test_run import call


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return tiny.project(tmp_path_factory.mktemp("project"))


def test_what_changes(spec, tmp_path):
    new = tmp_path / "new.yaml"
    new.write_text(
        spec.read_text()
        .replace("{lora: {rank: 4, alpha: 8, dropout: 0.1}}", "{pa: {rank: 2}}")
        .replace("{query,value}", "query")
        .replace("batch_size: 8", "batch_size: 4")
    )
    result = call("plan", new, "--against", spec)
    lines = result.stdout.splitlines()
    where = "bert.encoder.layer.*.attention.self"
    assert lines[:2] == ["settings", f"  rules[0].target: {where}.{{query,value}}.weight -> {where}.query.weight"]
    assert "  train.batch_size: 8 -> 4" in lines and "  rules[0].apply[0].lora.rank: 4 -> none" in lines
    assert [line for line in lines if line[0] in "+-"] == [
        f"- {where}.query.weight  lora(rank=4, alpha=8, dropout=0.1)  2 sites, 256 tuned",
        f"+ {where}.query.weight  pa(rank=2)  2 sites, 128 tuned, does not merge",
        f"- {where}.value.weight  lora(rank=4, alpha=8, dropout=0.1)  2 sites, 256 tuned",
    ]
    assert "  tuned parameters: 512 -> 128 (-75.0%)" in lines
    assert "  head parameters: 34, as before" in lines and "  merges: yes -> no" in lines
    assert result.exit_code == 0


def test_nothing_changes(spec):
    lines = list(difference(Session(spec), Session(spec)))
    assert lines[:3] == ["settings: the same", "sites: the same", "totals"]
    assert not [line for line in lines if line[0] in "+-" or "->" in line.removeprefix(lines[-2])]


def test_a_plan_says_what_a_step_costs(spec):
    result = call("plan", spec, "--set", "rules.0.apply.0.lora.rank=2")
    assert result.exit_code == 0 and "256 tuned parameters" in result.stdout
    assert "MB of activations" in result.stdout and "extension" in result.stdout
    wrong = call("plan", spec, "--set", "rules.0.apply.0.lora.rank=99")
    assert wrong.exit_code == 1 and wrong.stderr.count("error: ") == 1


@pytest.mark.parametrize(("form", "start"), [("svg", "<svg"), ("dot", "digraph"), ("mermaid", "flowchart")])
def test_show_writes_a_picture(spec, tmp_path, form, start):
    out = tmp_path / f"layer.{form}"
    result = call("show", spec, "--layer", "1", "--format", form, "--out", out)
    assert result.exit_code == 0 and result.stdout.strip() == str(out)
    text = out.read_text()
    assert text.startswith(start) and "attention.self.query.weight.lora.a" in text


def test_no_such_layer(spec, tmp_path):
    missing = call("show", spec, "--layer", "7", "--out", tmp_path / "none.svg")
    assert missing.exit_code == 1 and "the model has no such layer" in missing.stderr
    assert not (tmp_path / "none.svg").exists()
