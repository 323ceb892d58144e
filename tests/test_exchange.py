"""Adapters from others and for others, as runs: in, out again, as low-rank terms, and who can serve a spec."""

import json

import peft
import pytest
import torch
import transformers
import typer
from safetensors.torch import load_file, save_file

from pipelines import export as exporting
from pipelines import fit as fitting
from pipelines import import_peft as importing
from pipelines.validate import Consumer, Level, check
from rewriter import Session, SubspanError
from rewriter.exchange import export_adapter, import_peft
from tests import tiny

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
    plan = import_peft(tmp_path / "peft", out, str(project.parent / "model"), TASK, LABELS)
    assert plan.head_parameters == 34 and {site.chain[0][0].name for site in plan.sites} == {"loha", "full"}
    Session(out / "spec.yaml").export(out)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(out / "merged").eval()
    torch.testing.assert_close(logits(merged, project), logits(their, project), rtol=1e-6, atol=1e-6)
    report = export_adapter(out)
    assert report["largest"] == 0.0
    base = transformers.AutoModelForSequenceClassification.from_pretrained(project.parent / "model")
    back = peft.PeftModel.from_pretrained(base, out / "peft").eval()
    torch.testing.assert_close(logits(back, project), logits(their, project), rtol=1e-6, atol=1e-6)


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
    fitting.fit(project, tuned / "merged", out, ["lora", "ssb", "prefix"], [2, 16], 0.01)
    report = json.loads((out / "fit.json").read_text())
    assert [one["method"] for one in report["methods"]] == ["lora", "lora", "ssb"]
    assert report["left_out"] == ["prefix: stands on no weight"] and report["error"] < 1e-5
    assert report["value"] == json.loads((tuned / "metrics.json").read_text())["validation"]["accuracy"]
    Session(out / "spec.yaml").export(out)
    assert json.loads((out / "verify.json").read_text())["max_abs_diff"] < 1e-5
