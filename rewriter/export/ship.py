"""Ship: a run's adapter becomes merged/ and onnx/, each compared with the tuned model before it appears."""

from pathlib import Path
from typing import Any

from ..adapters.store import load_adapter, read_manifest
from ..errors import SubspanError
from ..files import aside, write_json
from ..graph.traced import Inputs
from ..pretrained import Pretrained, for_onnx, load_model, load_processor, save_model
from ..spec import Spec
from ..trace import trace
from .merge import merge, rest
from .onnx import export_onnx
from .verify import batches, differences, onnx_stage, torch_stage


def ship(spec: Spec, run: Path) -> dict[str, Any]:
    """Write merged/, onnx/ and verify.json into a run's folder, all or none.

    Args:
        spec: of the run.
        run: its folder, with an adapter.

    Returns:
        The content of verify.json.

    Raises:
        SubspanError: the adapter is of other weights, or a stage differs by more than `export.verify.atol`.
    """
    pretrained, processor, task = load_model(spec), load_processor(spec), spec.task
    inputs, passes = task.inputs(pretrained.model), spec.train.passes
    traced = trace(pretrained.module, inputs, ("eval",), passes.off)
    tuned = load_adapter(traced, run / "adapter", without=passes.off, also=passes.on)
    whole = tuned.plan.merges
    stored = merge(tuned, traced, partly=True)
    merge(tuned, pretrained.model, partly=True)
    stages = {"merged": torch_stage(traced if whole else rest(tuned, traced))}
    with aside(run / "merged", run / "onnx", run / "verify.json") as (merged, onnx, verify):
        if spec.export.checkpoint and whole:
            save_model(pretrained, str(merged))
            processor.save_pretrained(merged)
            task.ship(merged, pretrained.module, spec.data.max_length if spec.data else processor.model_max_length)
            stages["checkpoint"] = torch_stage(_reload(spec, merged).module)
        if spec.export.onnx:
            onnx.mkdir()
            processor.save_pretrained(onnx)
            for_onnx(pretrained.model)
            module = pretrained.module
            export_onnx(
                module if whole else rest(tuned, trace(module, inputs, modes=("eval",))),
                inputs,
                onnx / "model.onnx",
                spec.export.onnx.opset,
                _metadata(spec, pretrained, run),
                passes.off,
            )
            stages["onnx"] = onnx_stage(onnx / "model.onnx")
        found = differences(torch_stage(tuned), stages, _samples(spec, pretrained, inputs, tuned.plan.rows))
        report = {
            "max_abs_diff": max(found.values(), default=0.0),
            "atol": spec.export.verify.atol,
            "stages": found,
            "stored_weights": stored,
        }
        if not report["max_abs_diff"] <= report["atol"]:
            worst = ", ".join(f"{name} {value:.2e}" for name, value in found.items())
            raise SubspanError(
                f"outputs differ from the tuned model's by more than export.verify.atol = {report['atol']:g}: {worst}; "
                "nothing is written"
            )
        write_json(verify, report)
    return report


def _reload(spec: Spec, folder: Path) -> Pretrained:
    """The checkpoint as anyone would load it."""
    model = spec.model.model_copy(update={"name": str(folder.absolute()), "revision": None})
    return load_model(spec.model_copy(update={"model": model}))


def _samples(spec: Spec, pretrained: Pretrained, inputs: Inputs, rows: int) -> Any:
    """Random inputs that the model takes beside so many rows of its own."""
    config = pretrained.model.config
    most = (getattr(config, "max_position_embeddings", None) or 0) - rows
    limits = [spec.data.max_length if spec.data else 0, most]
    return batches(inputs, getattr(config, "vocab_size", 2), min((n for n in limits if n > 0), default=None))


def _metadata(spec: Spec, pretrained: Pretrained, run: Path) -> dict[str, object]:
    """What a server needs to know of an ONNX file."""
    manifest = read_manifest(run / "adapter")
    return {
        "task": spec.model.task,
        "labels": pretrained.labels,
        **spec.task.metadata(pretrained.labels),
        "base": manifest["base"],
        "versions": manifest["versions"],
    }
