"""Ship: a run's adapter becomes merged/ and onnx/, each compared with the tuned model before it appears."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.store import load_adapter, read_manifest
from ..data import encode, load_rows
from ..errors import SpecError, SubspanError, UnreachableError, reason
from ..files import aside, read_json, write_json
from ..graph.traced import Inputs, TracedModel
from ..pretrained import Pretrained, collator, for_onnx, load_model, processor_of, save_model
from ..sources import absent
from ..spec import Spec
from ..trace import trace
from ..training.checkpoint import load_predictions
from ..tuned import TunedModel
from . import compare
from .merge import merge, rest
from .onnx import export_onnx
from .verify import Stage, batches, onnx_stage, torch_stage


def ship(spec: Spec, run: Path) -> dict[str, Any]:
    """Write merged/, onnx/ and verify.json into a run's folder, all or none.

    Args:
        spec: of the run.
        run: its folder, with an adapter.

    Returns:
        The content of verify.json.

    Raises:
        SubspanError: the adapter is of other weights, or a stage differs by more than `export.verify.atol`, by default
            by more than the tuned model's own rounding explains.
    """
    pretrained, task = load_model(spec), spec.task
    processor = processor_of(spec, pretrained)
    inputs, passes = task.inputs(pretrained.model, processor=processor), spec.train.passes
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
        samples = list(_samples(spec, pretrained, inputs, tuned))
        report = _compared(spec, run, pretrained, traced, tuned, stages, samples)
        report["stored_weights"] = stored
        write_json(verify, report)
    return report


def _compared(
    spec: Spec,
    run: Path,
    pretrained: Pretrained,
    traced: TracedModel,
    tuned: TunedModel,
    stages: Mapping[str, Stage],
    random: list[dict[str, Tensor]],
) -> dict[str, Any]:
    """The content of verify.json, less what merging says.

    Raises:
        SubspanError: a stage is too far from the tuned model, or decides otherwise.
    """
    rows, why = _rows(spec, run, pretrained, tuned)
    # Nothing is shipped wider than float32: the rounding that counts is that of float32.
    wide64 = next(tuned.parameters()).dtype == torch.float64
    reference = torch_stage(compare.retyped(tuned, torch.float32) if wide64 else tuned)
    random = _usable(reference, random, why)
    samples = [("the random inputs", 0, inputs, {}) for inputs in random]
    wider = -(-compare.WIDE_ROWS // rows.size) if rows else 0
    samples += list(compare.batches_of(rows, tuned.input_names, 0, wider)) if rows else []
    tally = compare.Tally(spec, tuned, stages)
    axes = compare.sequences(traced.graphs["eval"], traced.input_names)
    atol = spec.export.verify.atol
    wide = compare.run_wide(torch_stage(compare.widened(tuned))) if atol is None else None
    found, scale = compare.distances(reference, wide, stages, samples, axes, tally)
    worst = {name: one.tuned for name, one in found.items() if name != "tuned"}
    if atol is not None and not max(worst.values(), default=0.0) <= atol:
        said = ", ".join(f"{name} {value:.2e}" for name, value in worst.items())
        raise SubspanError(
            f"outputs differ from the tuned model's by more than export.verify.atol = {atol:g}: {said}; nothing is "
            "written"
        )
    eps = torch.finfo(
        torch.float32 if wide64 else next(tuned.parameters()).dtype
    ).eps  # The pretrained model itself is float32 by now, for ONNX.
    if atol is None and (said := compare.too_far(found, scale, eps)):
        raise SubspanError(said)
    measures = {}
    if rows:
        for _, _, inputs, targets in compare.batches_of(rows, tuned.input_names, wider):
            for name, stage in stages.items():
                tally.add(name, stage(inputs), targets)
        measures = tally.measured(rows)
        compare.check_measured(spec, measures, rows, compare.is_half(tuned) or spec.train.precision != "float32")
    counts = {
        "random": sum(len(next(iter(inputs.values()))) for inputs in random),
        "compared": min(len(rows.encoded), wider * rows.size) if rows else 0,
        "validation": len(rows.encoded) if rows else 0,
        "why": why,
    }
    return compare.report(spec, found, counts, measures, atol is None)


def _usable(stage: Stage, random: list[dict[str, Tensor]], why: str | None) -> list[dict[str, Tensor]]:
    """The random inputs that the tuned model takes: some look for a token, or take some lengths alone.

    Args:
        why: there are no validation rows, if so.

    Raises:
        SubspanError: it takes none, and there are no rows.
    """
    usable, reasons = [], []
    for inputs in random:
        try:
            stage(inputs)
            usable.append(inputs)
        except (SubspanError, RuntimeError, IndexError, ValueError) as error:
            reasons.append(reason(error))
    if not usable and why is not None:
        raise SubspanError(f"nothing to compare on: {why}, and the model takes no random inputs ({reasons[0]})")
    return usable


def _rows(spec: Spec, run: Path, pretrained: Pretrained, tuned: TunedModel) -> tuple[compare.Rows | None, str | None]:
    """The validation rows of a run, or why there are none."""
    file = run / "metrics.json"
    if spec.data is None:
        return None, "the run has no data"
    if not file.is_file():
        raise SubspanError(f"{file} is missing: the run has not ended; train with --resume ends it")
    if (lacking := absent(spec.data)) is not None:
        return None, lacking
    try:
        rows = load_rows(spec, pretrained.labels).validation
        encoded = encode(spec, rows, pretrained.processor, pretrained.labels)
    except UnreachableError as error:
        return None, error.message
    except SpecError as error:
        raise SubspanError(f"the data has changed since the run was tuned: {error.message}; put it back") from error
    collate = collator(spec, pretrained, tuned.input_names)
    own = read_json(file).get("validation")
    if not isinstance(own, dict) or not isinstance(own.get(spec.metric, ""), int | float | None):
        raise SubspanError(f"{file}: not the metrics of this run")
    return compare.Rows(
        encoded, collate, min(spec.train.batch_size, compare.WIDE_ROWS), load_predictions(run), own
    ), None


def _reload(spec: Spec, folder: Path) -> Pretrained:
    """The checkpoint as anyone would load it."""
    model = spec.model.model_copy(update={"name": str(folder.absolute()), "revision": None})
    return load_model(spec.model_copy(update={"model": model}))


def _samples(spec: Spec, pretrained: Pretrained, inputs: Inputs, tuned: TunedModel) -> Any:
    """Random inputs of lengths that the model takes beside its own rows."""
    config = pretrained.model.config
    config = config.get_text_config()
    bounds = (getattr(config, "max_position_embeddings", None), tuned.longest)
    limits = [spec.data.max_length if spec.data else 0, *(one - tuned.rows for one in bounds if one)]
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
