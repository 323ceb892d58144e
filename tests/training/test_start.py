"""Starting from another run: from its values, by the same rules, on to the same bits."""

import re
import shutil

import pytest
from safetensors.torch import load_file

from rewriter import Session, SubspanError
from rewriter.training.checkpoint import checkpoints
from tests import tiny


def adapter(folder):
    return load_file(folder / "adapter" / "adapter.safetensors")


def test_a_run_starts_from_another_one_with_the_same_rules(tmp_path):
    """At a rate of nothing it stays what it was; at a rate it moves from there, and resumes to the same bits."""
    spec = tiny.project(tmp_path)
    vera = "rules.0.apply=[{vera: {rank: 4}}]"
    Session(spec, vera, "train.seed=3").tune(tmp_path / "first")
    first = adapter(tmp_path / "first")
    still = Session(spec, vera, "train.learning_rate=1e-30", "train.weight_decay=0", "train.epochs=0.5")
    still.tune(tmp_path / "still", start=tmp_path / "first")
    assert adapter(tmp_path / "still").keys() == first.keys()
    assert all(value.equal(first[name]) for name, value in adapter(tmp_path / "still").items())
    more = Session(spec, vera)
    more.tune(tmp_path / "more", start=tmp_path / "first")
    found = adapter(tmp_path / "more")
    assert not any(value.equal(first[name]) for name, value in found.items() if name.endswith((".d", ".b")))
    shutil.rmtree(tmp_path / "first")  # What it started from is kept with it.
    shutil.rmtree(tmp_path / "more" / "adapter")
    (tmp_path / "more" / "metrics.json").unlink()
    shutil.rmtree(checkpoints(tmp_path / "more" / "checkpoints")[-1])
    more.tune(tmp_path / "more", resume=True)
    assert all(value.equal(found[name]) for name, value in adapter(tmp_path / "more").items())


def test_options_that_count_while_tuning_alone_may_be_others(tmp_path):
    spec = tiny.project(tmp_path)
    Session(spec, "train.epochs=0.2").tune(tmp_path / "first")
    other = "rules.0.apply=[{lora: {rank: 4, alpha: 8, dropout: 0.3, ratio: 4}}]"
    still = Session(spec, other, "train.learning_rate=1e-30", "train.weight_decay=0", "train.epochs=0.2")
    still.tune(tmp_path / "run", start=tmp_path / "first")
    first = adapter(tmp_path / "first")
    assert all(value.equal(first[name]) for name, value in adapter(tmp_path / "run").items())


REFUSED = [
    (
        "rules.0.apply=[{lora: {rank: 2, alpha: 8}}]",
        "query.weight is lora(rank=4, alpha=8, dropout=0.1) in that run and lora(rank=2",
    ),
    (
        "rules.0.target=bert.encoder.layer.*.attention.self.query.weight",
        "value.weight is lora(rank=4, alpha=8, dropout=0.1) in that run and not tuned",
    ),
    ("rules.0.apply=[{adalora: {rank: 2}}]", "in that run and adalora"),
    (
        "model.labels=[positive,negative]",
        "model.labels is ['negative', 'positive'] in that run and ['positive', 'negative'] in",
    ),
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """Of a project beside whose spec lies a run, first/."""
    file = tiny.project(tmp_path_factory.mktemp("start"))
    Session(file, "train.epochs=0.2").tune(file.with_name("first"))
    return file


@pytest.mark.parametrize(("setting", "said"), REFUSED)
def test_a_run_of_other_rules_is_no_start(spec, tmp_path, setting, said):
    first = spec.with_name("first")
    with pytest.raises(SubspanError, match=re.escape(said)):
        Session(spec, setting).tune(tmp_path / "run", start=first)
    assert not (tmp_path / "run").exists()
    with pytest.raises(SubspanError, match="in another folder"):
        Session(spec).tune(first, overwrite=True, start=first)
    with pytest.raises(SubspanError, match=r"no such file"):
        Session(spec).tune(tmp_path / "run", start=tmp_path)
