"""The model card: what a run was made of, how well it does, what was compared, and how it is loaded."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from ..files import read_json
from ..resources import PACKAGE, is_local
from ..spec import Spec
from ..spec.data import Source
from . import compare
from .listing import heads_of, listing, markdown, where

_DRAWS = 200


def deviation(spec: Spec, rows: compare.Rows | None) -> float | None:
    """The standard error of a run's metric: over 200 draws of its predictions with replacement, as many each time.

    None where it kept no predictions, or one of them is not a row's alone.
    """
    if rows is None or rows.kept is None or len(rows.kept) != len(rows.encoded):
        return None
    if spec.metric == "loss" or spec.metric != spec.compared or not spec.task.draws(spec.metric):
        return None
    draw = np.random.default_rng(0).integers(len(rows.kept), size=(_DRAWS, len(rows.kept)))
    return float(np.std([spec.task.measure(spec.metric, rows.kept[some], rows.encoded) for some in draw]))


def card(
    spec: Spec,
    run: Path,
    report: Mapping[str, Any],
    found: Mapping[str, Any] | None,
    error: float | None,
    labels: Sequence[str],
) -> str:
    """Markdown with the header that hubs read.

    Args:
        run: the run's folder.
        report, found: the content of verify.json and of export.json.
        error: from `deviation`.
        labels: names of classes.
    """
    metrics, plan = (
        read_json(run / f"{name}.json") if (run / f"{name}.json").exists() else {} for name in ("metrics", "plan")
    )
    own = metrics.get("validation", {}).get(spec.metric) if spec.data else None
    base, hub = spec.model.name, not is_local(spec.model.name) and not spec.model.name.startswith(PACKAGE)
    data = [EvalResult(spec.task.tag, _format(spec), _named(spec), spec.metric, own)] if own is not None else None
    header = ModelCardData(
        model_name=run.resolve().name,
        base_model=base if hub else None,
        library_name="transformers",
        pipeline_tag=spec.task.tag,
        tags=["subspan", "peft", "onnx"],
        eval_results=data,
    )
    known = Path(base).name if is_local(base) else base.removeprefix(PACKAGE)
    share = f"{plan['trainable_parameters']:,} of {plan['total_parameters']:,} parameters tuned" if plan else ""
    lines = [
        "---", header.to_yaml().rstrip(), "---", "",
        f"# {run.resolve().name}", "",
        f"{known}, adapted by [Subspan](https://arxiv.org/abs/2407.05417): {share}.", "",
        "| | |", "| --- | --- |",
        f"| task | {spec.task.name} |",
    ]  # fmt: skip
    lines += [f"| labels | {', '.join(labels)} |"] if labels else []
    lines += [f"| {name} | {value} |" for name, value in _tuned(spec).items()]
    if own is not None:
        spread = f" ± {error:.4f} (one standard error)" if error is not None else ""
        rows = metrics["generated" if spec.task.written(spec.metric) else "validation"].get("rows")
        if (before := metrics.get("before", {}).get(spec.metric)) is not None:
            lines += [f"| {spec.metric} before | {before:.4f} |"]
        lines += [f"| {spec.metric} when tuned | {own:.4f}{spread} on {rows} validation rows |"]
    lines += ["", "## What was compared", ""]
    if report["rows"]["why"] is not None:
        lines += [f"On random rows, not on validation rows: {report['rows']['why']}.", ""]
    lines += ["| | largest difference from the tuned model |", "| --- | --- |"]
    called = {"onnx": "onnx, in float32"}
    lines += [f"| {called.get(name, name)} | {value:.1e} |" for name, value in report["stages"].items()]
    if found:
        lines += ["", *_files(found)]
    lines += ["", *_loading(spec, bool(plan.get("merges")) and spec.export.checkpoint, found is not None)]
    return "\n".join(lines) + "\n"


def _tuned(spec: Spec) -> dict[str, str]:
    """What was tuned, on what, and how."""
    steps = lambda rule: ", ".join(  # noqa: E731
        json.dumps(one) if any(one.values()) else next(iter(one))
        for one in rule.model_dump(mode="json", exclude_defaults=True)["apply"]
    )
    found = {"rules": "; ".join(f"`{rule.target}`: {steps(rule)}" for rule in spec.rules)}
    if spec.data:
        limit = {f"{part} rows": n for part, n in spec.data.limit.model_dump().items() if n is not None}
        where = {name: value for one in spec.data.sources for name, value in one.where.items()}
        some = {**where, **limit}
        found["data"] = _named(spec) + "".join(f"; {name}: {value}" for name, value in some.items())
        found["longest text"] = f"{spec.data.max_length} tokens"
    train = spec.train
    length = f"{train.max_steps} steps" if train.max_steps else f"{train.epochs:g} epochs"
    found["training"] = f"{length}, {train.batch_size} rows a step, learning rate {train.learning_rate:g}"
    return found


def _format(spec: Spec) -> str:
    formats = {one.format for one in spec.data.sources}
    return (formats.pop() if len(formats) == 1 else None) or "other"


def _named(spec: Spec) -> str:
    """What the data is called, without folders of the machine it was on."""
    return " + ".join(map(_called, spec.data.sources))


def _called(source: Source) -> str:
    if source.name is not None:
        return source.name
    given = source.files
    files = [given] if isinstance(given, str) else list(given.values()) if isinstance(given, dict) else list(given)
    flat = [one for some in files for one in ([some] if isinstance(some, str) else some)]
    return ", ".join(dict.fromkeys(Path(one).name for one in flat))


def _files(found: Mapping[str, Any]) -> list[str]:
    shapes, rows, _ = listing(found)
    columns = ("name", "file", "holds", "MB", "metric", "same decisions", "largest difference", *shapes)
    table = markdown(heads_of(found, columns, shapes), [[row[one] for one in columns] for row in rows])
    said = f"`onnx/model.onnx` is {found['chosen']}, for {found['target']}."
    on = [f"Times on {where(found)}.", ""] if where(found) else []
    return ["## Files", "", said, "", *on, *table]


def _loading(spec: Spec, merged: bool, onnx: bool) -> list[str]:
    """The files of the folder, wherever it is."""
    task = spec.task
    lines = ["## Loading", "", "```python", *(["import pathlib", ""] if onnx else []), "import huggingface_hub"]
    lines += ["import onnxruntime"] if onnx else []
    lines += ["import transformers", ""]
    lines += ['folder = huggingface_hub.snapshot_download("owner/name")  # or the path of this folder']
    lines += [f"processor = transformers.{task.processor}.from_pretrained(folder)"]
    lines += [f"model = transformers.{task.auto}.from_pretrained(folder)  # the merged checkpoint"] if merged else []
    lines += ['file = next(pathlib.Path(folder).rglob("model.onnx"))'] if onnx else []
    lines += ["session = onnxruntime.InferenceSession(file)"] if onnx else []
    return [*lines, "```"]
