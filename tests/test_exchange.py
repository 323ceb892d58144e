"""Adapters from others and for others, as runs: in, out again, as low-rank terms, and who can serve a spec."""

import json

import peft
import pytest
import torch
import transformers
import typer
from safetensors.torch import load_file, save_file

from pipelines import combine as combining
from pipelines import export as exporting
from pipelines import fit as fitting
from pipelines import import_peft as importing
from pipelines.validate import Consumer, Level, check
from rewriter import Session, SubspanError
from rewriter.exchange import combine_runs, export_adapter, import_peft
from rewriter.spec import load_spec
from tests import tiny

pytestmark = pytest.mark.xdist_group("exchange")  # Its runs are tuned once.
TASK = "sequence-classification"
LABELS = ("model.labels=[negative,positive]",)
TEXT = "good film"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exchange")
    return tiny.project(folder)


@pytest.fixture(scope="module")
def run(project):
    out = project.parent / "run"
    Session(project).tune(out)
    return out


def their_folder(project, folder, **more):
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(project.parent / "model")
    config = peft.LoHaConfig(r=2, alpha=4, target_modules=["query", "value"], task_type="SEQ_CLS", **more)
    model = peft.get_peft_model(base, config).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    return model


def logits(model, project):
    tokenizer = transformers.AutoTokenizer.from_pretrained(project.parent / "model")
    with torch.no_grad():
        return model(**tokenizer(TEXT, return_tensors="pt")).logits


def test_a_folder_of_peft_is_a_run_that_is_exported(project, tmp_path):
    their = their_folder(project, tmp_path / "peft")
    out = tmp_path / "run"
    settings = (*LABELS, "export.onnx=null")
    plan = import_peft(tmp_path / "peft", out, str(project.parent / "model"), TASK, settings)
    assert plan.head_parameters == 34 and {site.chain[0][0].name for site in plan.sites} == {"loha", "full"}
    Session(out / "spec.yaml").export(out)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(out / "merged").eval()
    torch.testing.assert_close(logits(merged, project), logits(their, project), rtol=1e-6, atol=1e-6)
    report = export_adapter(out)
    assert report["largest"] == 0.0
    base = transformers.AutoModelForSequenceClassification.from_pretrained(project.parent / "model")
    back = peft.PeftModel.from_pretrained(base, out / "peft").eval()
    torch.testing.assert_close(logits(back, project), logits(their, project), rtol=1e-6, atol=1e-6)


TRAINED = {
    "lora": peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"),
    "vera": peft.VeraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_trained_by_peft_tuned_on_here_and_back(project, tmp_path, name):
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(project.parent / "model")
    their = peft.get_peft_model(base, TRAINED[name])
    tokenizer = transformers.AutoTokenizer.from_pretrained(project.parent / "model")
    batch = tokenizer([TEXT, "bad film"], return_tensors="pt", padding=True)
    optimiser = torch.optim.AdamW([p for p in their.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        their(**batch, labels=torch.tensor([1, 0])).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    their.eval().save_pretrained(tmp_path / "peft")
    out, more = tmp_path / "run", tmp_path / "more"
    settings = [*LABELS, *data_of(project), "export.onnx=null"]
    import_peft(tmp_path / "peft", out, str(project.parent / "model"), TASK, settings)
    Session(out / "spec.yaml").export(out)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(out / "merged").eval()
    torch.testing.assert_close(logits(merged, project), logits(their, project), rtol=1e-6, atol=1e-6)
    Session(out / "spec.yaml", "train.epochs=1", "train.learning_rate=1e-2").tune(more, start=out)
    Session(more / "spec.yaml").export(more)
    export_adapter(more)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(project.parent / "model")
    back = peft.PeftModel.from_pretrained(base, more / "peft").eval()
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(more / "merged").eval()
    torch.testing.assert_close(logits(back, project), logits(merged, project), rtol=1e-6, atol=1e-6)
    assert float((logits(back, project) - logits(their, project)).abs().max()) > 1e-3


IMPORTS = [
    ({"task": "causal-lm", "settings": ()}, {}, "task_type SEQ_CLS, and --task causal-lm is CAUSAL_LM"),
    ({"base": "nowhere/at-all"}, {}, "nowhere/at-all"),
    ({"settings": ("model.labels=[a,b,c]",)}, {}, "are its labels others"),
    ({}, {"modules_to_save": []}, "it would be random"),
]


@pytest.mark.parametrize(("given", "config", "said"), IMPORTS, ids=[said for *_, said in IMPORTS])
def test_what_is_of_another_model_is_refused_and_leaves_nothing(project, tmp_path, given, config, said):
    their_folder(project, tmp_path / "peft")
    if config:
        file = tmp_path / "peft" / "adapter_model.safetensors"
        save_file({key: value for key, value in load_file(file).items() if "classifier" not in key}, file)
        written = tmp_path / "peft" / "adapter_config.json"
        written.write_text(json.dumps(json.loads(written.read_text()) | config))
    arguments = {"base": str(project.parent / "model"), "task": TASK, "settings": LABELS} | given
    with pytest.raises(SubspanError, match=said):
        import_peft(tmp_path / "peft", tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()
    with pytest.raises(SubspanError, match=r"it has no adapter_config\.json"):
        import_peft(tmp_path, tmp_path / "run", **arguments)


def assert_served(folder, most=16):
    """vLLM's checks of a folder: what it reads of the configuration, the ends of keys, and the rank."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config.get("modules_to_save") and not config.get("use_dora")
    assert config.get("bias", "none") == "none" and config["r"] <= most and config["lora_alpha"] > 0
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        root, path = key[: len("base_model.model.")], key[len("base_model.model.") :]
        module, end = path.removesuffix(".weight").rsplit(".", 1)
        assert root == "base_model.model." and path.endswith(".weight") and end in ("lora_A", "lora_B")
        assert module.rsplit(".", 1)[1] in {one.rsplit(".", 1)[1] for one in config["target_modules"]}
        assert value.shape[0 if end == "lora_A" else 1] <= most


@pytest.mark.parametrize("step", ["{lora: {rank: 4, alpha: 2}}", "{dora: {rank: 2}}", "ssb", "{loha: {rank: 2}}"])
def test_low_rank_terms_keep_the_metric(project, tmp_path, step):
    Session(project, f"rules.0.apply=[{step}]", "train.epochs=1").tune(tmp_path / "run")
    report = export_adapter(tmp_path / "run", low_rank=True, rank=16)
    assert report["metric"] == "accuracy" and report["after"] >= report["before"] - 0.02
    config = tmp_path / "run" / "peft-lora" / "adapter_config.json"
    assert json.loads(config.read_text())["modules_to_save"] == ["classifier"]


def test_a_lora_of_a_decoder_passes_the_checks_of_vllm(tmp_path):
    base = tiny.save_model(tmp_path / "model", "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    their = peft.get_peft_model(model, peft.LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for p in their.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    their.save_pretrained(tmp_path / "peft")
    import_peft(tmp_path / "peft", tmp_path / "run", str(base), "causal-lm")
    report = export_adapter(tmp_path / "run", low_rank=True)
    assert not report["calibrated"] and all(one["r"] <= 4 for one in report["sites"].values())
    assert_served(tmp_path / "run" / "peft-lora")


SERVED = [
    ("peft", "{lora: {rank: 4}}", None),
    ("peft", "ssb", "PEFT has no ssb"),
    ("peft", "ia3", "PEFT changes the layer's bias too"),
    ("peft", "{fourierft: {frequencies: 4}}", "draws others than are tuned here"),
    ("vllm", "{lora: {rank: 4}}", "vLLM reads nothing that is saved whole"),
    ("genai", "{lora: {rank: 4}}", None),
    ("olive", "{hira: {rank: 4}}", "olive reads low-rank terms of linear layers alone"),
]


@pytest.mark.parametrize(("by", "step", "said"), SERVED)
def test_who_can_serve_is_said_beforehand(project, by, step, said):
    session = Session(project, f"rules.0.apply=[{step}]")
    if said is None:
        check(session, Level.plan, Consumer(by))
        return
    with pytest.raises(SubspanError, match=said) as caught:
        check(session, Level.plan, Consumer(by))
    assert ".apply: " in str(caught.value)


def data_of(project):
    """The data section of the project's spec, as settings."""
    files = project.parent / "data.csv"
    return [
        "data.format=csv", f"data.files={files}", "data.split={validation: 16, seed: 0}", "data.max_length=16",
        "data.columns={text: text, label: label}",
    ]  # fmt: skip


def test_an_imported_run_with_data_has_its_metric_and_is_exported_by_command(project, tmp_path):
    their_folder(project, tmp_path / "peft")
    out, settings = tmp_path / "run", [*LABELS, *data_of(project)]
    importing.import_peft(tmp_path / "peft", str(project.parent / "model"), TASK, out, settings)
    metrics = json.loads((out / "metrics.json").read_text())["validation"]
    assert metrics["rows"] == 16 and 0 <= metrics["accuracy"] <= 1
    exporting.export(out, measure=False)
    verified = json.loads((out / "verify.json").read_text())
    assert verified["metrics"]["onnx"]["accuracy"] == metrics["accuracy"]
    still = Session(out / "spec.yaml", "train.learning_rate=1e-30", "train.weight_decay=0", "train.epochs=0.2")
    assert still.tune(tmp_path / "more", start=out)["validation"]["accuracy"] == metrics["accuracy"]
    exporting.export(out, adapter=exporting.Adapter.low_rank)
    report = json.loads((out / "peft-lora" / "subspan.json").read_text())
    assert report["calibrated"] and report["before"] == metrics["accuracy"]
    importing.import_peft(tmp_path / "peft", str(project.parent / "model"), TASK, out, list(LABELS), overwrite=True)
    assert sorted(file.name for file in out.iterdir() if not file.name.startswith(".")) == [
        "adapter", "plan.json", "spec.yaml",
    ]  # fmt: skip


OPTIONS = [
    ({"swappable": True, "adapter": exporting.Adapter.peft}, "give one of them"),
    ({"beside": ["other"]}, "--beside is of --swappable"),
    ({"rank": 2}, "--rank is of low-rank terms: --adapter lora"),
]


@pytest.mark.parametrize(("options", "said"), OPTIONS, ids=[said for _, said in OPTIONS])
def test_options_that_would_do_nothing_are_refused(run, capsys, options, said):
    with pytest.raises(typer.Exit):
        exporting.export(run, **options)
    assert said in capsys.readouterr().err


def test_a_full_fine_tuning_is_fitted_by_command(project, tmp_path):
    tuned, out = tmp_path / "full", tmp_path / "fitted"
    Session(project, "rules.0.apply=[full]", "train.epochs=1", "export.onnx=null").tune(tuned)
    Session(tuned / "spec.yaml").export(tuned)
    fitting.fit(project, tuned / "merged", out, ["lora", "ssb", "prefix"], [2, 16], 0.01, ["export.onnx=null"])
    report = json.loads((out / "fit.json").read_text())
    assert [one["method"] for one in report["methods"]] == ["lora", "lora", "ssb"]
    assert [one["value"] for one in report["methods"]][1] == report["value"]  # rank 16 is all of it
    assert report["left_out"] == ["prefix: stands on no weight"] and report["error"] < 1e-5
    assert report["value"] == json.loads((tuned / "metrics.json").read_text())["validation"]["accuracy"]
    Session(out / "spec.yaml").export(out)
    assert json.loads((out / "verify.json").read_text())["max_abs_diff"] < 1e-5


@pytest.fixture(scope="module")
def pair(project):
    """Two runs of different methods, and of different heads."""
    out = [project.parent / "one", project.parent / "other"]
    less = ("train.epochs=1", "export.onnx=null")
    Session(project, "rules.0.apply=[{lora: {rank: 2}}]", *less).tune(out[0])
    Session(project, "rules.0.apply=[{loha: {rank: 2}}]", *less, "train.seed=1").tune(out[1])
    return out


def merged(folder):
    if not (folder / "merged").exists():
        Session(folder / "spec.yaml").export(folder)
    return load_file(folder / "merged" / "model.safetensors")


def base_of(project):
    tensors = load_file(project.parent / "model" / "model.safetensors")
    return {f"bert.{name}": value for name, value in tensors.items()}


def test_runs_are_added_and_taken_away(project, pair, tmp_path):
    report = combine_runs(pair, [0.5, -2.0], tmp_path / "sum")
    base = base_of(project)
    one, other, found = merged(pair[0]), merged(pair[1]), merged(tmp_path / "sum")
    assert any(not one[name].equal(value) for name, value in base.items()) and found["classifier.weight"].equal(
        one["classifier.weight"]
    )
    for name in base:
        expected = base[name] + 0.5 * (one[name] - base[name]) - 2.0 * (other[name] - base[name])
        # float32 rounds each of three weights by 6e-8 of entries below 1.
        torch.testing.assert_close(found[name], expected, rtol=0, atol=5e-7)
    assert [entry["weight"] for entry in report["runs"]] == [0.5, -2.0]
    for entry, run in zip(report["runs"], pair, strict=True):
        assert entry["alone"] == json.loads((run / "metrics.json").read_text())["validation"]["accuracy"]
        assert 0 <= entry["combined"] <= 1
    assert report["value"] == report["runs"][0]["combined"]


def test_one_run_alone_is_that_run_and_its_negation_cancels_it(project, pair, tmp_path):
    report = combine_runs(pair[:1], [1.0], tmp_path / "same")
    assert report["runs"][0]["alone"] == report["runs"][0]["combined"]
    combine_runs([pair[1], pair[1]], [1.0, -1.0], tmp_path / "none")
    base, found = base_of(project), merged(tmp_path / "none")
    assert all(found[name].equal(value) for name, value in base.items())


def test_a_combination_as_low_rank_terms_by_command(pair, tmp_path):
    out = tmp_path / "out"
    combining.combine(pair, [1.0], out, "ties", 0.3, rank=4)
    report = json.loads((out / "combine.json").read_text())
    assert report["calibrated"] and {one["r"] for one in report["sites"].values()} == {4}
    rules = load_spec(out / "spec.yaml").rules
    assert {one.name for rule in rules for one, _ in rule.chain} == {"lora", "full"}
    exporting.export(out, measure=False)
    assert json.loads((out / "verify.json").read_text())["max_abs_diff"] < 1e-5
    combining.combine(pair[:1], [1.0], out, error=1e-6, overwrite=True)
    report = json.loads((out / "combine.json").read_text())
    assert all(one["exact"] and one["r"] == 2 for one in report["sites"].values())


def test_what_is_no_matrix_stays_whole_beside_low_rank_terms(project, pair, tmp_path):
    Session(project, "rules.0.target=bert.encoder.layer.*.attention.self.query.bias", "rules.0.apply=[full]",
            "train.epochs=1", "export.onnx=null").tune(tmp_path / "bias")  # fmt: skip
    combine_runs([pair[0], tmp_path / "bias"], [1.0, 1.0], tmp_path / "out", rank=2)
    one, other, found = merged(pair[0]), merged(tmp_path / "bias"), merged(tmp_path / "out")
    name = "bert.encoder.layer.0.attention.self.query"
    torch.testing.assert_close(found[f"{name}.weight"], one[f"{name}.weight"], rtol=0, atol=1e-6)
    assert found[f"{name}.bias"].equal(other[f"{name}.bias"]) and not found[f"{name}.bias"].equal(one[f"{name}.bias"])


COMBINATIONS = [
    ({"weights": [1.0, 2.0, 3.0]}, "3 weights for 2 runs"),
    ({"how": "ties"}, "--density, in"),
    ({"density": 0.5}, "--density, in"),
    ({"how": "dare_linear", "density": 0.0}, "--density, in"),
    ({"weights": [float("nan")]}, "--weight nan: is no number"),
    ({"weights": [0.0]}, "--weight 0: of no run anything is left"),
    ({"rank": 0}, "--rank is 1 or more"),
    ({"runs": []}, "0 weights for 0 runs"),
    ({"how": "slerp"}, "--how slerp: one of linear, ties"),
    ({"runs": ["here", "prompt"]}, "can't merge, so it is no change of a weight"),
    ({"runs": ["here", "elsewhere"]}, "of another base than"),
]


@pytest.mark.parametrize(("given", "said"), COMBINATIONS, ids=[said for _, said in COMBINATIONS])
def test_what_can_t_be_combined_is_refused_and_leaves_nothing(project, pair, tmp_path, given, said):
    runs = {"here": pair[0], "prompt": tmp_path / "prompt", "elsewhere": tmp_path / "there" / "run"}
    if "prompt" in given.get("runs", ()):
        rule = "rules=[{target: bert.embeddings, apply: [{prompt: {length: 2}}]}]"
        Session(project, rule, "train.epochs=0.2").tune(runs["prompt"])
    if "elsewhere" in given.get("runs", ()):
        (tmp_path / "there").mkdir()
        there = tiny.project(tmp_path / "there")
        tiny.save_model(tmp_path / "there" / "model", seed=1)
        Session(there, "train.epochs=0.2").tune(runs["elsewhere"])
    arguments = {"weights": [1.0]} | given | {"runs": [runs[one] for one in given["runs"]] if "runs" in given else pair}
    with pytest.raises(SubspanError, match=said):
        combine_runs(out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SubspanError, match="is one of the runs that are combined"):
        combine_runs(pair, [1.0], pair[1], overwrite=True)
