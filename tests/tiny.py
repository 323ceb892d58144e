"""A tiny local model with a tokenizer, tiny data and a spec over both, for tests that run whole commands."""

import csv
import json
from pathlib import Path

import tokenizers
import torch
import transformers as hf

from tests.architectures import ARCHITECTURES

WORDS = ["good", "great", "fine", "bad", "awful", "poor", "film", "plot", "the", "a", "was", "and"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]

SPEC = """\
version: 1
model:
  name: {model}
  task: sequence-classification
  labels: [negative, positive]
data:
  format: csv
  files: {data}
  split: {{validation: 16, seed: 0}}
  columns: {{text: text, label: label}}
  max_length: 16
rules:
  - target: "bert.encoder.layer.*.attention.self.{{query,value}}.weight"
    apply: [{{lora: {{rank: 4, alpha: 8, dropout: 0.1}}}}]
  - target: "classifier.*"
    apply: [full]
train: {{epochs: 2, batch_size: 8, learning_rate: 1.0e-2, checkpoint_steps: 4, log_steps: 2}}
"""


def make_tokenizer() -> hf.PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    pair = [("[CLS]", 2), ("[SEP]", 3)]
    core.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", pair
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        eos_token="[SEP]",
        **names,
    )


def save_model(folder: Path, architecture: str = "bert", seed: int = 0) -> Path:
    """The architecture's base model (no head) as `from_pretrained` reads it, with a tokenizer."""
    torch.manual_seed(seed)
    one = ARCHITECTURES[architecture]
    model = one.model._from_config(one.config(**{**one.options, "pad_token_id": 0}))
    if architecture == "bert":
        model = model.bert
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_csv(file: Path, rows: int = 64) -> Path:
    """Sentences whose label is told by one word; labels are written as 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    pick = lambda n: int(torch.randint(n, (1,), generator=generator))  # noqa: E731
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["text", "label"])
        for i in range(rows):
            tail = " ".join(WORDS[6 + pick(6)] for _ in range(1 + pick(6)))
            writer.writerow([f"{WORDS[3 * (1 - i % 2) + pick(3)]} {tail}", i % 2])
    return file


def without_dropout(model: Path) -> Path:
    """The model's folder, its config changed: what is drawn for a batch would depend on how it is cut."""
    file = model / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {name: 0.0 for name in config if name.endswith("dropout_prob")}))
    return model


def project(folder: Path) -> Path:
    """model/, data.csv and spec.yaml in a folder; returns the spec."""
    model, data = save_model(folder / "model"), save_csv(folder / "data.csv")
    spec = folder / "spec.yaml"
    spec.write_text(SPEC.format(model=model, data=data))
    return spec
