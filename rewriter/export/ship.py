"""Ship: a run's adapter becomes merged/ and onnx/, each compared with the tuned model before it appears."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.store import load_adapter, read_manifest
from ..data import encode, load_rows
from ..errors import SpecError, SubspanError, UnreachableError, reason
from ..files import aside, read_json, write_json, write_text
from ..graph.sublayers import attentions
from ..graph.traced import Inputs, TracedModel
from ..pretrained import Pretrained, collator, for_onnx, load_model, positions, processor_of, save_model
from ..sources import absent
from ..spec import Spec
from ..trace import trace
from ..training.checkpoint import load_predictions
from ..tuned import TunedModel
from . import compare
from .card import card, deviation
from .choose import SHIPPED, beside_checkpoint, offer, settle, timed
from .decoder import decoder_of, decoding_stage, genai_config
from .latency import shapes_of
from .merge import merge, rest
from .onnx import export_onnx, files_of
from .variants import PLAIN, VARIANTS, wanted
from .verify import Stage, batches, onnx_stage, open_file, remembered, torch_stage


def ship(spec: Spec, run: Path, target: str = "cpu", measure: bool = False) -> dict[str, Any]:
    """Write merged/, onnx/, verify.json and export.json into a run's folder, all or none.

    Args:
        spec: of the run.
        run: its folder, with an adapter.
        target: what the files are for.
        measure: build all variants that make sense there, time them, and take the fastest that holds; else the one in
            float32 is taken.

    Returns:
        The content of verify.json.

    Raises:
        SubspanError: the adapter is of other weights, or a stage differs by more than `export.verify.atol`, by default
            by more than the tuned model's own rounding explains.
    """
    task = spec.task
    pretrained, processor, inputs, traced, tuned = load_tuned(spec, run)
    longest = longest_of(pretrained, tuned)
    shapes = shapes_of(spec.export.latency, longest, tuned.varies) if measure else []
    count = len(attentions(traced.graphs["eval"]))
    truth = _truth(spec, run, pretrained, traced, tuned, inputs)
    whole = tuned.plan.merges
    stored = merge(tuned, traced, partly=True)
    merge(tuned, pretrained.model, partly=True)
    stages = {"merged": torch_stage(traced if whole else rest(tuned, traced))}
    targets = (run / "merged", run / "onnx", run / "verify.json", run / "export.json")
    with aside(*targets) as (merged, onnx, verify, export):
        if spec.export.checkpoint and whole:
            save_model(pretrained, str(merged))
            processor.save_pretrained(merged)
            task.ship(merged, pretrained.module, spec.data.max_length if spec.data else processor.model_max_length)
            stages["checkpoint"] = torch_stage(load_merged(spec, merged).module)
        report = _compared(truth, stages)
        stages.clear()  # Of a large model no more than one stage has room.
        if spec.export.onnx:
            for_onnx(pretrained.model)
            module = pretrained.module
            shipped = module if whole else rest(tuned, trace(module, inputs, modes=("eval",)))
            plain, cache = _write(truth, pretrained, shipped, inputs, onnx, _metadata(spec, pretrained, run, longest))
            report = compare.joined(report, _compared(truth, {"onnx": onnx_stage(plain)}))
        report["stored_weights"] = stored
        write_json(verify, report)
        found = None
        if spec.export.onnx:
            offered = offer(truth, wanted(spec.export.variants, target, measure), plain, count, target)
            batches = {f"{b}x{n}": task.inputs(pretrained.model, b, n, processor).kwargs for b, n in shapes}
            batches |= _steps(batches) if cache["holds"] else {}
            found = {"target": target, "variants": offered, "beside": timed(offered, shipped, batches, target)}
            found |= {"chosen": settle(offered, plain)} | ({"cache": cache} if task.decodes else {})
            write_json(export, found)
            if cache["holds"]:
                config = genai_config(onnx / SHIPPED, pretrained.model.config, processor, longest)
                write_json(onnx / "genai_config.json", config)
            if merged.is_dir():
                beside_checkpoint(onnx, merged)
        for folder in (folder for folder in (merged, onnx) if folder.is_dir()):
            write_text(folder / "README.md", card(spec, run, report, found, deviation(spec, truth.rows)))
    return report


def load_tuned(spec: Spec, run: Path) -> tuple[Pretrained, Any, Inputs, TracedModel, TunedModel]:
    """The base of a run, its processor, examples of what it reads, its eval graph, and that with the run's adapter."""
    pretrained, passes = load_model(spec), spec.train.passes
    processor = processor_of(spec, pretrained)
    inputs = spec.task.inputs(pretrained.model, processor=processor)
    traced = trace(pretrained.module, inputs, ("eval",), passes.off)
    tuned = load_adapter(traced, run / "adapter", without=passes.off, also=passes.on)
    return pretrained, processor, inputs, traced, tuned


def _steps(batches: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Each batch's last tokens, after all others."""
    return {f"{name} step": {**one, "input_ids": one["input_ids"][:, -1:]} for name, one in batches.items()}


def longest_of(pretrained: Pretrained, tuned: TunedModel | None = None) -> int | None:
    """The longest sequence of tokens that a model takes, together with what transforms put before it; None: any."""
    own = getattr(pretrained.model.config.get_text_config(), "max_position_embeddings", None)
    bounds = (own, positions(pretrained.model), tuned.longest if tuned else None)
    return min((most - (tuned.rows if tuned else 0) for most in bounds if most), default=None)


def _write(
    truth: compare.Truth,
    pretrained: Pretrained,
    shipped: nn.Module,
    inputs: Inputs,
    folder: Path,
    metadata: dict[str, object],
) -> tuple[Path, dict[str, Any]]:
    """Write the float32 file, with a cache if it can have one, and what lies beside it.

    Returns:
        The file, and whether it has a cache and why not.
    """
    spec = truth.spec
    folder.mkdir()
    pretrained.processor.save_pretrained(folder)
    pretrained.model.config.save_pretrained(folder)
    file = folder / VARIANTS[PLAIN].file
    cache = _with_cache(truth, pretrained.model if truth.tuned.plan.merges else None, inputs, file, metadata)
    if not cache["holds"]:
        export_onnx(shipped, inputs, file, spec.export.onnx.opset, metadata, spec.train.passes.off)
    return file, cache


def _with_cache(
    truth: compare.Truth, model: nn.Module | None, inputs: Inputs, file: Path, metadata: dict[str, object]
) -> dict[str, Any]:
    """Write a decoder that reads and returns keys and values, if the model is one that can; else nothing is there.

    Args:
        model: merged; None: something can't merge.

    Returns:
        Whether it holds, and why not.
    """
    spec = truth.spec
    if not spec.task.decodes or model is None:
        return {"holds": False, "reason": "what can't merge stands in a graph without a cache"}
    try:
        found = decoder_of(model, inputs)
        if found is None:
            return {"holds": False, "reason": "the model keeps no keys and values that can be handed on"}
        decoder, examples, called = found
        export_onnx(decoder, examples, file, spec.export.onnx.opset, metadata, spec.train.passes.off, called)
        stage = decoding_stage(open_file(file))
        why = truth.far(
            "decoding", *truth.distances({"decoding": stage}, compare.Tally(spec, truth.tuned, ["decoding"]))
        )
        if why is None:
            return {"holds": True, "reason": None}
    except SubspanError as error:
        why = str(error)
    for one in files_of(file):
        one.unlink()
    return {"holds": False, "reason": why}


def _truth(
    spec: Spec, run: Path, pretrained: Pretrained, traced: TracedModel, tuned: TunedModel, inputs: Inputs
) -> compare.Truth:
    """What the run's stages are compared with."""
    # Nothing is shipped wider than float32: the rounding that counts is that of float32.
    wide64 = next(tuned.parameters()).dtype == torch.float64
    reference = torch_stage(compare.retyped(tuned, torch.float32), torch.float32) if wide64 else torch_stage(tuned)
    rows, why = _rows(spec, run, pretrained, tuned)
    random = _usable(reference, list(_samples(spec, pretrained, inputs, tuned)), why)
    set_by_hand, dtype = spec.export.verify.atol is not None, compare.wider(tuned)
    wide = None if set_by_hand else compare.run_wide(torch_stage(compare.retyped(tuned, dtype), dtype))
    axes = compare.sequences(traced.graphs["eval"], traced.input_names)
    eps = torch.finfo(torch.float32 if wide64 else next(tuned.parameters()).dtype).eps
    wide = wide and remembered(wide)
    return compare.Truth(spec, tuned, remembered(reference), wide, rows, why, random, axes, eps)


def _compared(truth: compare.Truth, stages: Mapping[str, Stage]) -> dict[str, Any]:
    """The content of verify.json, less what merging says.

    Raises:
        SubspanError: a stage is too far from the tuned model, or decides otherwise.
    """
    spec, rows, atol = truth.spec, truth.rows, truth.spec.export.verify.atol
    tally = compare.Tally(spec, truth.tuned, stages)
    found, scale = truth.distances(stages, tally)
    worst = {name: one.tuned for name, one in found.items() if name != "tuned"}
    if atol is not None and not max(worst.values(), default=0.0) <= atol:
        said = ", ".join(f"{name} {value:.2e}" for name, value in worst.items())
        raise SubspanError(
            f"outputs differ from the tuned model's by more than export.verify.atol = {atol:g}: {said}; nothing is "
            "written"
        )
    if atol is None and (said := compare.too_far(found, scale, truth.eps)):
        raise SubspanError(said)
    measures = truth.measured(stages, tally)
    if rows:
        half = compare.is_half(truth.tuned) or spec.train.precision != "float32"
        compare.check_measured(spec, measures, rows, half)
    counts = {
        "random": sum(len(next(iter(inputs.values()))) for inputs in truth.random),
        "compared": min(len(rows.encoded), truth.wider * rows.size) if rows else 0,
        "validation": len(rows.encoded) if rows else 0,
        "why": truth.why,
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


def load_merged(spec: Spec, folder: Path) -> Pretrained:
    """The checkpoint as anyone would load it."""
    model = spec.model.model_copy(update={"name": str(folder.absolute()), "revision": None})
    return load_model(spec.model_copy(update={"model": model}))


def _samples(spec: Spec, pretrained: Pretrained, inputs: Inputs, tuned: TunedModel) -> Any:
    """Random inputs of lengths that the model takes beside its own rows."""
    config = pretrained.model.config.get_text_config()
    limits = [spec.data.max_length if spec.data else 0, longest_of(pretrained, tuned) or 0]
    return batches(inputs, getattr(config, "vocab_size", 2), min((n for n in limits if n > 0), default=None))


def _metadata(spec: Spec, pretrained: Pretrained, run: Path, longest: int | None) -> dict[str, object]:
    """What a server needs to know of an ONNX file."""
    manifest = read_manifest(run / "adapter")
    return {
        "task": spec.model.task,
        "labels": pretrained.labels,
        "longest": longest,
        **spec.task.metadata(pretrained.labels),
        "base": manifest["base"],
        "versions": manifest["versions"],
    }
