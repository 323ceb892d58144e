"""Every task from a spec to verified files, on tiny models: text, pairs, tags, images, decoders, encoder-decoders."""

import json

import datasets
import PIL.Image
import pytest
import torch
import transformers as hf

from tests.architectures import ARCHITECTURES
from tests.pipelines.test_run import fails, succeeds
from tests.tiny import WORDS, make_tokenizer, save_csv

COMMON = """\
version: 1
model: {{name: {model}, task: {task}{more}}}
data:
  format: {format}
  files: {files}
  split: {{validation: 12}}
  columns: {columns}
  max_length: 16
rules: [{{target: "{target}", apply: [{{lora: {{rank: 4}}}}]}}]
train: {{epochs: 1, batch_size: 8, learning_rate: 1.0e-2, gradient_accumulation: 2}}
"""


def text_model(folder, architecture, model_class=None, **options):
    one = ARCHITECTURES[architecture]
    config = one.config(**{**one.options, "pad_token_id": 0, **options})
    torch.manual_seed(0)
    (model_class or one.model)._from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def image_model(folder):
    one = ARCHITECTURES["vit"]
    torch.manual_seed(0)
    one.model._from_config(one.config(**one.options)).save_pretrained(folder)
    hf.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def images(folder):
    for label, value in (("dark", 40), ("light", 200)):
        (folder / label).mkdir(parents=True)
        for i in range(16):
            PIL.Image.new("RGB", (20, 18), (value + i, value, value)).save(folder / label / f"{i}.png")
    return folder


def rows(file, make, count=48):
    with file.open("w") as out:
        out.writelines(json.dumps(make(i)) + "\n" for i in range(count))
    return file


def sentence(i):
    return " ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(3, 4 + i % 5))


BERT = "bert.encoder.layer.*.attention.self.{query,value}.weight"
CASES = {
    "pairs": ("sequence-classification", "bert", None, "{text: a, text_pair: b, label: y}", BERT, "accuracy"),
    "names": ("sequence-classification", "roberta", None, "{text: a, label: name}", BERT.replace("bert.", "roberta."), "accuracy"),
    "decoder": ("sequence-classification", "gpt2", hf.GPT2ForSequenceClassification, "{text: a, label: y}", "transformer.h.*.attn.c_attn.weight", "accuracy"),
    "regression": ("regression", "distilbert", None, "{text: a, label: score}", "distilbert.transformer.layer.*.attention.q_lin.weight", "mse"),
    "tags": ("token-classification", "bert", hf.BertForTokenClassification, "{tokens: words, label: tags}", BERT, "accuracy"),
    "gpt2": ("causal-lm", "gpt2", None, "{text: a}", "transformer.h.*.attn.c_attn.weight", "perplexity"),
    "llama": ("causal-lm", "llama", None, "{text: a}", "model.layers.*.self_attn.{q,v}_proj.weight", "perplexity"),
    "mixtral": ("causal-lm", "mixtral", None, "{text: a}", "model.layers.*.mlp.experts.{gate_up_proj,down_proj}", "perplexity"),
    "t5": ("seq2seq-lm", "t5", None, "{text: a, label: b}", "{encoder,decoder}.block.*.layer.*.**.{q,v}.weight", "perplexity"),
}  # fmt: skip
LABELS = {"names": "[awful, superb]", "tags": "[O, NOUN]", "pairs": "[no, yes]", "decoder": "[no, yes]"}


def row(i):
    words = sentence(i).split()
    return {
        "a": sentence(i), "b": sentence(i + 7), "y": i % 2, "name": ("awful", "superb")[i % 2], "score": i / 10,
        "words": words, "tags": [int(len(word) > 3) for word in words],
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_text(case, tmp_path):
    task, architecture, model_class, columns, target, metric = CASES[case]
    model = text_model(tmp_path / "model", architecture, model_class)
    more = f", labels: {LABELS[case]}" if case in LABELS else ""
    files = rows(tmp_path / "data.jsonl", row)
    spec, run = tmp_path / "spec.yaml", tmp_path / "run"
    spec.write_text(
        COMMON.format(model=model, task=task, more=more, format="json", files=files, columns=columns, target=target)
    )
    succeeds("validate", spec)
    succeeds("train", spec, "--out", run)
    succeeds("export", run)
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["validation"]) == {metric, "loss", "rows"} and metrics["train"]["steps"] == 3
    if metric == "perplexity":
        assert metrics["validation"]["perplexity"] == pytest.approx(
            torch.tensor(metrics["validation"]["loss"]).exp().item(), rel=0.05
        )
    assert json.loads((run / "verify.json").read_text())["max_abs_diff"] < 1e-4


def test_images(tmp_path):
    model, files = image_model(tmp_path / "model"), images(tmp_path / "images")
    spec, run = tmp_path / "spec.yaml", tmp_path / "run"
    text = COMMON.format(
        model=model, task="image-classification", more=", labels: [dark, light]", format="imagefolder", files=files,
        columns="{image: image, label: label}", target="vit.layers.*.attention.q_proj.weight",
    )  # fmt: skip
    spec.write_text(text)
    succeeds("train", spec, "--out", run)
    succeeds("export", run)
    assert json.loads((run / "verify.json").read_text())["max_abs_diff"] < 1e-4


def test_files_for_validation_and_labels_of_the_model(tmp_path):
    model = text_model(tmp_path / "model", "bert", id2label={0: "0", 1: "1"}, label2id={"0": 0, "1": 1})
    train, validation = save_csv(tmp_path / "train.csv", 32), save_csv(tmp_path / "validation.csv", 16)
    spec = tmp_path / "spec.yaml"
    text = COMMON.format(
        model=model, task="sequence-classification", more="", format="csv",
        files=f"{{train: {train}, validation: [{validation}]}}", columns="{text: text, label: label}", target=BERT,
    )  # fmt: skip
    spec.write_text(text.replace("  split: {validation: 12}\n", ""))
    succeeds("train", spec, "--out", tmp_path / "run")
    assert "no validation data" in fails("validate", spec, "--set", f"data.files={train}")


def sentences(folder):
    """A spec for labelled sentences."""
    model = text_model(folder / "model", "bert")
    spec = folder / "spec.yaml"
    text = COMMON.format(
        model=model, task="sequence-classification", more=", labels: [a, b]", format="csv",
        files=save_csv(folder / "data.csv"), columns="{text: text, label: label}", target=BERT,
    )  # fmt: skip
    spec.write_text(text)
    return spec


def test_half_precision_runs_on_the_cpu(tmp_path):
    spec = sentences(tmp_path)
    succeeds("train", spec, "--out", tmp_path / "run", "--set", "train.precision=bfloat16")
    if not torch.cuda.is_available():
        assert "float16 needs CUDA" in fails(
            "train", spec, "--out", tmp_path / "half", "--set", "train.precision=float16"
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda(tmp_path):
    spec = sentences(tmp_path)
    for precision in ("float32", "bfloat16", "float16"):
        out = tmp_path / precision
        succeeds("train", spec, "--out", out, "--set", f"train.precision={precision}")
        succeeds("export", out)


def test_datasets_stays_offline():
    assert datasets.config.HF_HUB_OFFLINE
