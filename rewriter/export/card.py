"""The model card: what a run was made of, how well it does, what was compared, and how it is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from ..files import read_json
from ..resources import PACKAGE, is_local
from ..spec import Spec
from . import compare
from .listing import listing, markdown

_DRAWS = 200


def deviation(spec: Spec, rows: compare.Rows | None) -> float | None:
    """The standard error of a run's metric: over 200 draws of its predictions with replacement, as many each time.

    None where it kept no predictions, or one of them is not a row's alone.
    """
    if rows is None or rows.kept is None or len(rows.kept) != len(rows.encoded):
        return None
    if spec.metric == "loss" or not spec.task.draws(spec.metric):
        return None
    draw = np.random.default_rng(0).integers(len(rows.kept), size=(_DRAWS, len(rows.kept)))
    return float(np.std([spec.task.measure(spec.metric, rows.kept[some], rows.encoded) for some in draw]))


def card(spec: Spec, run: Path, report: Mapping[str, Any], found: Mapping[str, Any] | None, error: float | None) -> str:
    """Markdown with the header that hubs read.

    Args:
        run: the run's folder.
        report, found: the content of verify.json and of export.json.
        error: from `deviation`.
    """
    metrics, plan = (
        read_json(run / f"{name}.json") if (run / f"{name}.json").exists() else {} for name in ("metrics", "plan")
    )
    own = metrics.get("validation", {}).get(spec.metric) if spec.data else None
    base, hub = spec.model.name, not is_local(spec.model.name) and not spec.model.name.startswith(PACKAGE)
    data = (
        [EvalResult(spec.task.tag, spec.data.format or "other", _named(spec), spec.metric, own)]
        if own is not None
        else None
    )
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
    rules = "; ".join(
        f"`{rule.target}`: {', '.join(next(iter(one)) for one in rule.model_dump(exclude_defaults=True)['apply'])}"
        for rule in spec.rules
    )
    lines = [
        "---", header.to_yaml().rstrip(), "---", "",
        f"# {run.resolve().name}", "",
        f"{known}, adapted by [Subspan](https://arxiv.org/abs/2407.05417): {share}.", "",
        "| | |", "| --- | --- |",
        f"| task | {spec.task.name} |",
        f"| rules | {rules} |",
    ]  # fmt: skip
    if own is not None:
        spread = f" ± {error:.4f} (one standard error)" if error is not None else ""
        rows = metrics["validation"].get("rows")
        lines += [f"| data | {_named(spec)} |", f"| {spec.metric} | {own:.4f}{spread} on {rows} validation rows |"]
    lines += ["", "## What was compared", "", "| | largest difference from the tuned model |", "| --- | --- |"]
    lines += [f"| {name} | {value:.1e} |" for name, value in report["stages"].items()]
    if found:
        lines += ["", *_files(found)]
    lines += ["", *_loading(spec, bool(plan.get("merges")) and spec.export.checkpoint, found is not None)]
    return "\n".join(lines) + "\n"


def _named(spec: Spec) -> str:
    """What the data is called, without folders of the machine it was on."""
    given = spec.data.name or spec.data.files
    files = [given] if isinstance(given, str) else list(given.values()) if isinstance(given, dict) else list(given)
    flat = [one for some in files for one in ([some] if isinstance(some, str) else some)]
    return ", ".join(dict.fromkeys(Path(one).name for one in flat)) if spec.data.name is None else spec.data.name


def _files(found: Mapping[str, Any]) -> list[str]:
    shapes, rows, _ = listing(found)
    columns = ("name", "holds", "MB", "metric", "same decisions", *shapes)
    heads = ["file", *columns[1:5], *(f"{shape}, ms" for shape in shapes)]
    table = markdown(heads, [[row[column] for column in columns] for row in rows])
    return ["## Files", "", f"`onnx/model.onnx` is {found['chosen']}, for {found['target']}.", "", *table]


def _loading(spec: Spec, merged: bool, onnx: bool) -> list[str]:
    task, lines = spec.task, ["## Loading", "", "```python"]
    lines += ["import onnxruntime"] if onnx else []
    lines += ["import transformers", "", f'processor = transformers.{task.processor}.from_pretrained("FOLDER")']
    lines += [f'model = transformers.{task.auto}.from_pretrained("FOLDER")  # the merged checkpoint'] if merged else []
    lines += ['session = onnxruntime.InferenceSession("FOLDER/onnx/model.onnx")'] if onnx else []
    return [*lines, "```"]
