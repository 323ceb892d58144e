"""What a run folder, an adapter or a cache may hold and be trusted."""

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewriter import Rule, Session, SubspanError, load_adapter, plan, rewrite, save_adapter, task_of
from rewriter.files import aside, recover
from rewriter.folder import claimed
from rewriter.svd import cached_svd
from tests.adapters.test_store import X, adapted, net, traced
from tests.tiny import project


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: {name: value * 0 for name, value in f.items()}, "another weight"),
        (lambda f: {**f, "u": f["u"] * torch.tensor([-1.0] + [1.0] * 5)}, "another weight"),
        (lambda f: {**f, "u": f["u"] * -1, "vt": f["vt"] * -1}, "other signs"),
        (lambda f: {**f, "u": f["u"] * 2, "s": f["s"] / 2}, "not orthogonal"),
        (lambda f: {**f, "s": f["s"] * math.nan}, "not finite"),
        (lambda f: {**f, "s": f["s"][:5]}, "another shape"),
        (lambda f: {"u": f["u"]}, "not the factors u, s and vt"),
        (lambda f: {"u": f["u"].flip(1), "s": f["s"].flip(0), "vt": f["vt"].flip(0)}, "out of order"),
    ],
    ids=["44-zeros", "44-sign", "44-signs", "44-scale", "44-nan", "44-shape", "44-names", "44-order"],
)
def test_44_a_poisoned_cache_is_named_and_made_anew(cache, change, said):
    weight = torch.randn(8, 6)
    true = cached_svd(weight)
    (file,) = cache.rglob("*.safetensors")
    save_file({name: value.contiguous() for name, value in change(true).items()}, file)
    with pytest.warns(UserWarning, match=f"{file.name}.*{said}"):
        found = cached_svd(weight)
    assert all(torch.equal(found[name], true[name]) for name in true)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached_svd(weight)


@pytest.mark.parametrize("shape", [(3, 8, 6), (6, 8), (8, 8)], ids=["44-batch", "44-wide", "44-square"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_44_a_true_cache_is_used(cache, shape, dtype):
    weight = torch.randn(shape).to(dtype)
    true = cached_svd(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(torch.equal(value, true[name]) for name, value in cached_svd(weight).items())


def factored(tmp_path):
    graph = traced(net())
    tuned = rewrite(
        graph, plan(graph, [Rule(target="0.weight", apply=["ssb"]), Rule(target="2.weight", apply=[{"svdiff": {}}])])
    )
    save_adapter(tuned, tmp_path / "adapter")
    return tuned


def test_44_an_adapter_knows_its_factors(tmp_path):
    factored(tmp_path)
    manifest = tmp_path / "adapter" / "adapter.json"
    data = json.loads(manifest.read_text())
    assert data["constants"]
    name = next(name for name in data["constants"] if name.endswith(".u"))
    data["constants"][name][0] += 1.0
    manifest.write_text(json.dumps(data))
    with pytest.raises(SubspanError, match=f"tuned beside another {name} than is computed here"):
        load_adapter(traced(net()), tmp_path / "adapter")


INDICES = [Rule(target="0.weight", apply=[{"fourierft": {"frequencies": 8}}])]


def indexed(tmp_path):
    graph = traced(net())
    save_adapter(rewrite(graph, plan(graph, INDICES)), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda i, d: (i * 0, d), "names one place twice"),
        (lambda i, d: (i + 48, d), "an entry out of range: they are 0 to 47"),
        (lambda i, d: (i - 48, d), "an entry out of range"),
        (lambda i, d: (i.float(), d), "is stored in torch.float32, expected torch.int64"),
        (lambda i, d: (i, d > 0), "is stored in torch.bool, expected torch.float"),
        (lambda i, d: (i, d.long()), "is stored in torch.int64, expected torch.float"),
        (lambda i, d: (i, d / 0), "holds a value that is not finite"),
        (lambda i, d: (i, d[:4]), r"is \(4,\), expected \(8,\)"),
    ],
    ids=["56-twice", "56-above", "56-below", "56-kind", "56-bool", "56-int", "56-nan", "56-shape"],
)
def test_56_tensors_of_an_adapter_are_what_they_should_be(tmp_path, change, said):
    folder = indexed(tmp_path)
    held = load_file(folder / "adapter.safetensors")
    index, tuned = sorted(held, key=lambda name: held[name].is_floating_point())
    values = change(held[index], held[tuned] + 0.0)
    save_file({index: values[0].contiguous(), tuned: values[1].contiguous()}, folder / "adapter.safetensors")
    with pytest.raises(SubspanError, match=said):
        load_adapter(traced(net()), folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data | {"given": {"0.weight.x": {"rank": math.inf}}}, "Infinity is no number of JSON"),
        (lambda data: data | {"given": {"0.weight.x": {"rank": "9" * 5000}}}, "not an adapter's manifest"),
        (lambda data: data | {"new": ["nowhere"]}, "'nowhere', newly made when it was tuned, is no parameter here"),
        (lambda data: data | {"new": 3}, "not an adapter's manifest"),
        (lambda data: data | {"rules": [{"target": "nowhere", "apply": ["ssb"]}]}, "its rules do not fit this model"),
        (lambda data: data | {"rules": []}, "made for other sites"),
        (lambda data: data | {"rules": [{"target": 1}]}, "not an adapter's manifest"),
        (lambda data: data | {"constants": 3}, "not an adapter's manifest"),
        (lambda data: data | {"format": 99}, "format 99, this version reads 1"),
        (lambda data: [data], "holds no JSON object"),
        (lambda data: "[" * 100_000, "broken JSON"),
    ],
    ids=["56-infinity", "56-long", "56-new", "56-new-kind", "56-target", "56-rules", "56-rule", "56-constants", "56-format", "56-list", "56-deep"],
)  # fmt: skip
def test_56_a_manifest_is_what_it_should_be(tmp_path, change, said):
    file = indexed(tmp_path) / "adapter.json"
    made = change(json.loads(file.read_text()))
    file.write_text(made if isinstance(made, str) else json.dumps(made))
    with pytest.raises(SubspanError, match=said):
        load_adapter(traced(net()), file.parent)


def test_an_adapter_still_loads(tmp_path):
    tuned = adapted(net())
    save_adapter(tuned, tmp_path / "adapter")
    assert torch.equal(load_adapter(traced(net()), tmp_path / "adapter")(X), tuned(X))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    spec = project(folder)
    Session(spec, "train.max_steps=2", "export.onnx=null").tune(folder / "run")
    return folder


@pytest.fixture
def run(tuned, tmp_path):
    """The tuned run with its base model, in a folder of its own."""
    shutil.copytree(tuned, tmp_path / "p")
    spec = tmp_path / "p" / "run" / "spec.yaml"
    spec.write_text(spec.read_text().replace(str(tuned), str(tmp_path / "p")))
    return tmp_path / "p" / "run"


def export(run):
    return Session(run / "spec.yaml").export(run)


def change_json(file, **more):
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda base: change_json(base / "config.json", hidden_act="relu"), "another config.json"),
        (lambda base: change_json(base / "config.json", layer_norm_eps=0.5), "another config.json"),
        (lambda base: change_json(base / "config.json", num_attention_heads=1), "another config.json"),
        (lambda base: (base / "tokenizer.json").write_text((base / "tokenizer.json").read_text().replace('"good"', '"x"').replace('"bad"', '"good"').replace('"x"', '"bad"')), "another tokenizer.json"),
        (lambda base: (base / "added_tokens.json").write_text('{"more": 16}'), "without added_tokens.json"),
    ],
    ids=["52-activation", "52-norm", "52-heads", "52-tokens", "52-added"],
)  # fmt: skip
def test_52_another_base_is_refused(run, change, said):
    change(run.parent / "model")
    with pytest.raises(SubspanError, match=f"tuned for a base model (with )?{said}"):
        export(run)
    assert not (run / "merged").exists()


def test_52_what_only_says_where_a_base_was_written_may_change(run):
    change_json(run.parent / "model" / "config.json", transformers_version="0", _name_or_path="elsewhere")
    assert export(run) and (run / "merged").is_dir()


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("  - negative\n  - positive", "  - positive\n  - negative", "model.labels"),
        ("rank: 4", "rank: 2", "rules"),
        ("alpha: 8", "alpha: 80", "rules"),
        ("max_length: 16", "max_length: 8", "data.max_length"),
    ],
    ids=["53-labels", "53-rank", "53-alpha", "53-length"],
)
def test_53_an_edited_spec_is_refused(run, old, new, place):
    file = run / "spec.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(SubspanError, match=f"tuned with another {place} than the run's spec.yaml has now; set it back"):
        export(run)


def test_53_a_checkpoint_goes_on_with_its_own_spec_alone(run):
    """Edited in both places, the spec of the run and the one that is given."""
    (run / "metrics.json").unlink()
    file = run / "spec.yaml"
    file.write_text(file.read_text().replace("weight_decay: 0.0", "weight_decay: 0.5"))
    with pytest.raises(SubspanError, match=r"state\.json: written by a run of another spec"):
        Session(file).tune(run, resume=True)


def test_20_any_character_in_the_path_of_a_run(tuned, tmp_path):
    out = tmp_path / "lora #3 [v2]*?" / "a b {c,d}$HOME 'ü"
    shutil.copytree(tuned / "run", out)
    assert Session(out / "spec.yaml").export(out) and (out / "merged" / "model.safetensors").is_file()
    (out / "metrics.json").unlink()
    Session(out / "spec.yaml").tune(out, resume=True)
    Session(out / "spec.yaml").tune(out, overwrite=True)
    assert (out / "adapter" / "adapter.json").is_file()


def test_53_what_is_exported_may_be_edited(run):
    file = run / "spec.yaml"
    file.write_text(file.read_text().replace("atol: null", "atol: 0.5"))
    assert export(run) and (run / "merged").is_dir()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.1, r"says accuracy 0\.1000, its predictions"),
        ("0.5", "not the metrics of this run"),
        ({}, "not the metrics of this run"),
    ],
    ids=["53-other", "53-text", "53-mapping"],
)
def test_53_an_edited_metric_is_seen(run, value, said):
    file = run / "metrics.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"validation": {**content["validation"], "accuracy": value}}))
    with pytest.raises(SubspanError, match=said):
        export(run)


@pytest.mark.parametrize("change", [lambda x: x * float("nan"), lambda x: x + 0.25], ids=["53-nan", "53-moved"])
def test_53_edited_predictions_are_seen(run, change):
    file = run / "predictions.safetensors"
    save_file({name: change(value.float()) for name, value in load_file(file).items()}, file)
    with pytest.raises(SubspanError, match=r"its predictions on the validation rows|0\.0% of its decisions"):
        export(run)


def test_47_a_folder_is_one_process_s(tmp_path):
    out = tmp_path / "run"
    with claimed(out):
        (out / "log.jsonl").write_text("first\n")
        said = f"another process works in it \\(process {os.getpid()} on "
        with pytest.raises(SubspanError, match=said), claimed(out):
            pass
        with pytest.raises(SubspanError, match=said), claimed(out, made=False):
            pass
        assert (out / "log.jsonl").read_text() == "first\n", "who is refused removes nothing"
    with claimed(out):
        pass


@pytest.mark.slow
def test_47_two_at_once(tmp_path):
    """Of two processes started together one runs; the other is refused and changes nothing, as within one above."""
    spec, out = project(tmp_path), tmp_path / "run"
    command = [sys.executable, "-m", "pipelines.train", str(spec), "--out", str(out), "--set", "train.max_steps=4"]
    env = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    both = [
        subprocess.Popen(
            [*command, "--set", f"train.seed={seed}"],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    said = [one.communicate() for one in both]
    codes = [one.returncode for one in both]
    assert sorted(codes) == [0, 1], said
    assert (
        "another process works in it" in said[codes.index(1)][1]
        or "there is something in it" in said[codes.index(1)][1]
    )
    seed = codes.index(0) + 1
    assert f"seed: {seed}" in (out / "spec.yaml").read_text()
    assert json.loads((out / "adapter" / "adapter.json").read_text())["spec"]["train"]["seed"] == seed


def test_47_a_run_that_fails_takes_itself_away(tmp_path):
    spec, out = project(tmp_path), tmp_path / "run"
    with pytest.raises(SubspanError):
        Session(spec, "train.learning_rate=1e30", "train.max_steps=3").tune(out)
    assert not out.exists()


@pytest.mark.parametrize("how", ["resume", "overwrite", "new"], ids="65-{}".format)
def test_65_a_folder_that_only_has_a_marker(tmp_path, how):
    spec, out = project(tmp_path), tmp_path / "run"
    with claimed(out):
        (out / ".unfinished-x").mkdir()
    Session(spec, "train.max_steps=1").tune(out, resume=how == "resume", overwrite=how == "overwrite")
    assert (out / "adapter").is_dir() and not (out / ".unfinished-x").exists()


def test_64_what_a_killed_process_left_is_removed(run):
    for place in (run, run / "checkpoints"):
        (place / ".unfinished-abc" / "new").mkdir(parents=True)
        (place / ".unfinished-abc" / "new" / "model.safetensors").write_bytes(b"x" * 100)
    export(run)
    assert not list(run.rglob(".unfinished-*"))


@pytest.mark.parametrize("at", range(1, 7))
def test_64_killed_between_renames(tmp_path, monkeypatch, at):
    """Wherever the process dies, afterwards there is all of the old or all of the new."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    count, real = iter(range(1, 100)), os.replace
    if (child := os.fork()) == 0:
        monkeypatch.setattr(os, "replace", lambda *args: os._exit(9) if next(count) == at else real(*args))
        with aside(tmp_path / "a", tmp_path / "b", tmp_path / "c") as places:
            for place in places[:2]:
                place.mkdir()
                (place / "new").touch()
            places[2].write_text("new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    recover(tmp_path)
    found = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert found in ({"a/old", "b/old"}, {"a/new", "b/new", "c"})


@pytest.mark.parametrize("option", ["--overwrite", "--resume"], ids="45-46-{}".format)
def test_45_a_folder_of_one_s_own_is_no_run(tmp_path, option):
    spec = project(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(SubspanError, match=f"{option}: .* is not a run: it has no .subspan-run"):
        Session(spec).tune(tmp_path, **{option[2:]: True})
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_66_a_resumed_run_reports_as_the_unbroken_one(tmp_path):
    """The same loss and the same log, also when it died just after a checkpoint at an epoch's end."""
    spec = project(tmp_path)
    settings = ("train.checkpoint_steps=6", "train.epochs=3", "train.log_steps=4")
    whole = Session(spec, *settings).tune(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("adapter", "metrics.json", "checkpoints/checkpoint-18"):
        file = tmp_path / "cut" / name
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-12").is_dir()
    resumed = Session(spec, *settings).tune(tmp_path / "cut", resume=True)
    assert resumed["train"]["loss"] == whole["train"]["loss"] and resumed["validation"] == whole["validation"]
    assert (tmp_path / "cut" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_43_a_batch_without_a_label_counts_nothing():
    """The mean is over the labels that there are, however the rows are cut into batches."""
    task = task_of("token-classification")
    logits, labels = torch.randn(4, 3, 2), torch.tensor([[0, 1, -100], [-100] * 3, [-100] * 3, [1, -100, -100]])
    means = []
    for size in (1, 2, 4):
        parts = [
            ({"labels": labels[i : i + size]}, SimpleNamespace(logits=logits[i : i + size])) for i in range(0, 4, size)
        ]
        means.append(sum(float(task.loss(out, t)) for t, out in parts) / sum(float(task.count(t)) for t, _ in parts))
    assert means == pytest.approx([means[0]] * 3, rel=1e-6)


def test_43_a_bare_nan_is_never_written(tmp_path, monkeypatch):
    """A validation loss that is no number stands as null, in the log too, and export says so."""
    spec, out = project(tmp_path), tmp_path / "run"
    session = Session(spec, "train.max_steps=1", "train.metric=loss")
    monkeypatch.setattr("rewriter.training.loop.predict", lambda *args: ({"loss": math.nan}, None))
    metrics = session.tune(out)
    monkeypatch.undo()
    assert metrics["validation"]["loss"] is None
    for line in (out / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(constant))
    with pytest.raises(SubspanError, match=r"loss of the run's metrics\.json is no number"):
        session.export()


def other_labels(folder):
    (file,) = folder.glob("*.csv")
    head, *rows = file.read_text().splitlines()
    file.write_text("\n".join([head, *reversed(rows)]) + "\n")


def other_weights(folder):
    file = folder / "model" / "model.safetensors"
    held = load_file(file)
    name = next(name for name in held if name.endswith("query.weight"))
    save_file(held | {name: held[name] * 2}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_labels, "training data"),
        (other_weights, "base model's weights"),
        (lambda folder: change_json(folder / "model" / "config.json", hidden_act="relu"), r"config\.json"),
    ],
    ids=["53-rows", "53-weights", "53-config"],
)
def test_53_a_run_goes_on_with_what_it_began_with(run, change, said):
    (run / "metrics.json").unlink()
    change(run.parent)
    with pytest.raises(SubspanError, match=f"the run had another {said} until now; put it back, or start anew"):
        Session(run / "spec.yaml").tune(run, resume=True)


def test_53_data_that_fits_no_more_is_no_missing_data(run):
    (data,) = run.parent.glob("*.csv")
    data.write_text("text,other\ngood,1\n")
    with pytest.raises(SubspanError, match="the data has changed since the run was tuned: no column 'label'"):
        export(run)
    data.unlink()
    assert export(run)["rows"]["why"].startswith("no such file")
    (run / "metrics.json").unlink()
    with pytest.raises(SubspanError, match="the run has not ended"):
        export(run)


@pytest.mark.parametrize("files", [None, -1, "x"])
def test_56_a_checkpoint_s_list_of_files(run, files):
    (run / "metrics.json").unlink()
    change_json(next((run / "checkpoints").iterdir()) / "state.json", files=files)
    with pytest.raises(SubspanError, match="not as it was written"):
        Session(run / "spec.yaml").tune(run, resume=True)
