"""Ship a tuned run: adapter -> merge -> checkpoint + ONNX -> verify -> report."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.console import Transforms, console, failures, located
from rewriter import (
    Inputs,
    Pretrained,
    Spec,
    SubspanError,
    batches,
    differences,
    example_inputs,
    export_onnx,
    for_onnx,
    load_adapter,
    load_model,
    load_processor,
    load_spec,
    merge,
    onnx_stage,
    print_summary,
    rest,
    save_model,
    torch_stage,
    trace,
)
from rewriter.adapters.store import check_transforms, read_manifest
from rewriter.files import aside, write_json


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    transforms: Transforms = None,
) -> None:
    """Merge a run's adapter, write merged/ and onnx/, and compare every stage's outputs with the tuned model's.

    A difference over export.verify.atol is an error, and then nothing is written. What can't merge (prefixes, prompts,
    adapters with a nonlinearity) stays in the ONNX graph, and there is no merged/ then.
    """
    with failures(run):
        if (run / "adapter").is_dir():
            check_transforms(run / "adapter")
        spec = load_spec(run / "spec.yaml")
        with located(spec):
            report = ship(spec, run)
        summarise(spec, run, report)


def ship(spec: Spec, run: Path) -> dict[str, Any]:
    """Write merged/, onnx/ and verify.json into the run's folder; returns the content of verify.json."""
    pretrained, processor = load_model(spec), load_processor(spec)
    inputs = example_inputs(pretrained.model, spec.model.task)
    traced = trace(pretrained.model, inputs, ("eval",), spec.train.passes.off)
    tuned = load_adapter(traced, run / "adapter", without=spec.train.passes.off, also=spec.train.passes.on)
    whole = tuned.plan.merges
    stored = merge(tuned, traced, partly=True)
    merge(tuned, pretrained.model, partly=True)
    stages = {"merged": torch_stage(traced if whole else rest(tuned, traced))}
    with aside(run / "merged", run / "onnx", run / "verify.json") as (merged, onnx, verify):
        if spec.export.checkpoint and whole:
            save_model(pretrained, str(merged))
            processor.save_pretrained(merged)
            stages["checkpoint"] = torch_stage(reload(spec, merged).model)
        if spec.export.onnx:
            onnx.mkdir()
            processor.save_pretrained(onnx)
            plain = for_onnx(pretrained.model)
            export_onnx(
                plain if whole else rest(tuned, trace(plain, inputs, modes=("eval",))),
                inputs,
                onnx / "model.onnx",
                spec.export.onnx.opset,
                metadata(spec, pretrained, run),
                spec.train.passes.off,
            )
            stages["onnx"] = onnx_stage(onnx / "model.onnx")
        found = differences(torch_stage(tuned), stages, samples(spec, pretrained, inputs, tuned.plan.rows))
        report = {
            "max_abs_diff": max(found.values()),
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


def reload(spec: Spec, folder: Path) -> Pretrained:
    """The checkpoint as anyone would load it."""
    model = spec.model.model_copy(update={"name": str(folder.absolute()), "revision": None})
    return load_model(spec.model_copy(update={"model": model}))


def samples(spec: Spec, pretrained: Pretrained, inputs: Inputs, rows: int):
    """Random inputs that the model takes beside so many rows of its own."""
    config = pretrained.model.config
    positions = (getattr(config, "max_position_embeddings", None) or 0) - rows
    limits = [spec.data.max_length if spec.data else 0, positions]
    return batches(inputs, getattr(config, "vocab_size", 2), min((n for n in limits if n > 0), default=None))


def metadata(spec: Spec, pretrained: Pretrained, run: Path) -> dict[str, object]:
    """What a server needs to know of an ONNX file."""
    manifest = read_manifest(run / "adapter")
    return {
        "task": spec.model.task,
        "labels": pretrained.labels,
        "base": manifest["base"],
        "versions": manifest["versions"],
    }


def summarise(spec: Spec, run: Path, report: dict[str, Any]) -> None:
    """Print what the run came to."""
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    share = f"{plan['trainable_thousandths']:.3f} thousandths of {plan['total_parameters']:,}"
    facts = {
        f"validation {spec.metric}": f"{metrics['validation'][spec.metric]:.4f}",
        "tuned parameters": f"{plan['trainable_parameters']:,} ({share}), and {plan['head_parameters']:,} in new heads",
        "largest difference": f"{report['max_abs_diff']:.2e} (atol {report['atol']:g}): {', '.join(report['stages'])}",
    }
    facts |= {name: run / name for name in ("adapter", "merged", "onnx") if (run / name).exists()}
    if spec.export.checkpoint and not plan["merges"]:
        facts["merged"] = "not written: what can't merge is in the ONNX graph alone"
    print_summary(f"exported {run}", facts, console)


if __name__ == "__main__":
    typer.run(export)
