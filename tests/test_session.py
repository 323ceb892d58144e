"""The main job as a library: one call each, mistakes with their place, nothing kept between sessions."""

import json

import pytest

from rewriter import Plan, Rule, Session, Spec, SubspanError
from rewriter.graph.traced import TracedModel
from tests import tiny


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tiny.project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def traces(monkeypatch):
    found, original = [], TracedModel.__init__
    monkeypatch.setattr(TracedModel, "__init__", lambda self, *args: (found.append(1), original(self, *args))[1])
    return found


def test_each_is_one_call(file, tmp_path):
    session = Session(file, "train.max_steps=3", "export.onnx=null")
    found = session.plan()
    assert isinstance(found, Plan) and found.trainable_parameters == 512
    assert repr(found) == f"<Plan: 6 sites, 512 tuned parameters of {found.total_parameters:,}, 34 in new heads>"
    assert session.cost().optimiser == 3 * 4 * 546
    job = session.prepare()
    assert (len(job.train), len(job.validation)) == (48, 16) and job.weights is None
    metrics = session.tune(tmp_path / "run")
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text()) and metrics["train"]["steps"] == 3
    report = session.export()
    assert report == json.loads((tmp_path / "run" / "verify.json").read_text())
    assert Session(tmp_path / "run" / "spec.yaml").export(tmp_path / "run")["stages"].keys() == report["stages"].keys()


@pytest.mark.parametrize(
    ("old", "new", "place", "said"),
    [
        ("rank: 4", "rank: 400", "14:27", "rank 400 is larger than"),
        ("text: text", "text: body", "10:19", "no column 'body'"),
        ("epochs: 2", "epoch: 2", "17:9", "did you mean 'epochs'"),
        ("[negative, positive]", "[negative]", "10:32", "holds '1'"),
        ("epochs: 2", "class_weights: {a: 1.0}, epochs: 2", "17:25", "'a' is none of the labels negative, positive"),
    ],
)
def test_mistakes_leave_with_file_line_and_column(file, tmp_path, old, new, place, said):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(SubspanError, match=said) as caught:
        Session(wrong).tune(tmp_path / "run")
    assert str(caught.value).startswith(f"{wrong}:{place}: ")
    assert not (tmp_path / "run").exists()


def test_a_spec_of_one_s_own_has_no_file(file, tmp_path):
    spec = Session(file).spec
    rules = [Rule(target="bert.encoder.layer.*.attention.self.query.weight", apply=[{"lora": {"rank": 99}}])]
    plain = Spec.model_validate({**spec.model_dump(by_alias=True), "rules": [rule.model_dump() for rule in rules]})
    with pytest.raises(SubspanError, match="rank 99 is larger than"):
        Session(plain).plan()
    with pytest.raises(SubspanError, match=r"'train\.seed=1' overrides what a file says"):
        Session(plain, "train.seed=1")


def test_nothing_is_kept_between_sessions_but_what_one_passes_on(file, traces):
    first = Session(file)
    first.plan()
    first.plan()
    assert len(traces) == 1
    Session(file).plan()
    assert len(traces) == 2
    Session(file, "rules.0.apply.0.lora.rank=2", like=first).plan()
    assert len(traces) == 2
    Session(file, "train.seed=1", like=first).plan()
    assert len(traces) == 3


def test_a_run_of_another_spec_is_not_exported(file, tmp_path):
    Session(file, "train.max_steps=1").tune(tmp_path / "run")
    with pytest.raises(SubspanError, match=r"is of another run: it differs in train\."):
        Session(file).export(tmp_path / "run")
    with pytest.raises(SubspanError, match=f"^{tmp_path}: no run is there"):
        Session(file).export(tmp_path)
    with pytest.raises(SubspanError, match="which run"):
        Session(file).export()
    with pytest.raises(SubspanError, match="there is something in it"):
        Session(file, "train.max_steps=1").tune(tmp_path / "run")


def test_the_passes_are_counted(file):
    assert Session(file).changes()["insert_weights"] > 0
