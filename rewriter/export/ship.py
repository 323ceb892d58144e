"""Ship: a run's adapter becomes merged/ and onnx/, each compared with the tuned model before it appears."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn

from ..adapters.store import load_adapter, read_manifest
from ..algebra import Format
from ..data import encode, load_rows
from ..errors import SpecError, SubspanError, UnreachableError, reason
from ..files import aside, read_json, write_json, write_text
from ..graph.sublayers import known_attentions
from ..graph.traced import Inputs, TracedModel
from ..pretrained import (
    Pretrained,
    collator,
    for_onnx,
    load_model,
    positions,
    processor_of,
    save_model,
    save_processor,
    set_ends,
)
from ..quantise import dequantise, forms_of, requantise
from ..sources import absent
from ..spec import Spec
from ..trace import trace
from ..training.checkpoint import load_predictions
from ..training.evaluation import referred
from ..tuned import TunedModel
from . import compare, encoder_decoder
from .card import card, deviation
from .choose import SHIPPED, beside_checkpoint, offer, settle, timed
from .decoder import decoder_of, decoding_stage, genai_config
from .latency import machine, shapes_of
from .merge import merge, rest
from .onnx import export_onnx, files_of
from .variants import PLAIN, VARIANTS, wanted
from .verify import Stage, batches, onnx_stage, open_file, torch_stage


def ship(spec: Spec, run: Path, target: str = "cpu", measure: bool = False) -> dict[str, Any]:
    """Write merged/, onnx/, verify.json and export.json into a run's folder, all or none.

    Of a large model there is never more than one in memory: what the tuned one makes of the rows is kept on disk, and
    what is merged is read again from the checkpoint.

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
    targets = (run / "merged", run / "onnx", run / "verify.json", run / "export.json")
    with aside(*targets) as (merged, onnx, verify, export):
        scratch = merged.parent.parent / "compared"
        scratch.mkdir()
        truth, report, model, again = _merged(spec, run, merged, scratch)
        shapes, found = model.shapes if measure else [], None
        if spec.export.onnx:
            plain, cache = _write(truth, model, again, onnx)
            grows = spec.task.decodes and cache["holds"]
            report = compare.joined(report, _compared(truth, {"onnx": onnx_stage(plain)}))
        write_json(verify, report)
        if spec.export.onnx:
            offered = offer(truth, wanted(spec.export.variants, target, measure), plain, model.attentions, target)
            found = {
                "target": target,
                "metric": spec.compared,
                "variants": offered,
                "machine": machine() if shapes else None,
            }
            found["beside"] = _timed(spec, model, again, offered, shapes, grows, target) if shapes else {}
            found |= {"chosen": settle(offered, plain)} | ({"cache": cache} if spec.task.writes else {})
            write_json(export, found)
            if grows:
                config = genai_config(onnx / SHIPPED, model.config, model.processor, model.longest)
                write_json(onnx / "genai_config.json", config)
            if merged.is_dir():
                beside_checkpoint(onnx, merged)
        if folders := [folder for folder in (merged, onnx) if folder.is_dir()]:
            text = card(spec, run, report, found, deviation(spec, truth.rows), model.labels)
            for folder in folders:
                write_text(folder / "README.md", text)
    return report


@dataclass(frozen=True)
class _Model:
    """What there is to know of a merged model without its weights.

    Attributes:
        config, processor, inputs: its own, and examples of what it reads.
        rest: the tuned one, where something can't merge.
        attentions: how many there are in the traced graph; None: some of no form that is known.
        longest: the longest sequence that it takes; None: any.
        shapes: batch sizes and lengths to time.
        labels: names of its classes.
        metadata: of its ONNX file.
    """

    config: Any
    processor: Any
    inputs: Inputs
    rest: TunedModel | None
    attentions: int | None
    longest: int | None
    shapes: list[tuple[int, int]]
    labels: list[str]
    metadata: dict[str, object]


# The merged model, as anyone would load it, and what is exported of it.
_Again = Callable[[], tuple[nn.Module, nn.Module]]


def _merged(spec: Spec, run: Path, folder: Path, scratch: Path) -> tuple[compare.Truth, dict[str, Any], _Model, _Again]:
    """Write merged/, if the spec wants one and everything merges, and compare what is merged.

    Returns:
        What to compare with, the content of verify.json up to here, the merged model, and how to have it again.
    """
    pretrained, processor, inputs, traced, tuned = load_tuned(spec, run)
    longest = longest_of(pretrained, tuned)
    model = _Model(
        pretrained.model.config,
        processor,
        inputs,
        None if tuned.plan.merges else tuned,
        known_attentions(traced.graphs["eval"]),
        longest,
        shapes_of(spec.export.latency, longest, tuned.varies),
        pretrained.labels,
        _metadata(spec, pretrained, run, longest),
    )
    truth = _truth(spec, run, pretrained, traced, tuned, inputs, scratch)
    forms = forms_of(pretrained.model)
    into = (traced, pretrained.model) if model.rest else (traced, pretrained.model, tuned)
    stored = merge(tuned, *into, partly=True)
    dequantise(traced, pretrained.model)
    whole = rest(tuned, traced) if model.rest else traced
    report = _compared(truth, {"merged": torch_stage(whole)}) | {"stored_weights": stored}
    if forms:
        requantise(whole, forms)
        report["requantised"] = _requantised(truth, whole, [form for form, _ in forms.values()])
    if model.rest:
        return truth, report, model, partial(_with_the_rest, pretrained, tuned, inputs)
    place = folder if spec.export.checkpoint else scratch / "merged"
    save_model(pretrained, str(place))
    save_processor(processor, place, spec.task)
    spec.task.ship(place, pretrained.module, spec.data.max_length if spec.data else processor.model_max_length)
    del pretrained, traced, tuned, whole
    gc.collect()
    if spec.export.checkpoint:
        report = compare.joined(report, _compared(truth, {"checkpoint": torch_stage(load_merged(spec, place).module)}))
    return truth, report, model, partial(_from_checkpoint, spec, place)


def _requantised(truth: compare.Truth, model: TracedModel, forms: list[Format]) -> dict[str, Any]:
    """What it costs to store the merged model in few bits again, as the base was: nothing is shipped so."""
    name = "requantised"
    stages, tally = {name: torch_stage(model)}, truth.tally([name])
    found, _ = truth.distances(stages, tally)
    metrics, agreement = truth.measured(stages, tally).get(name, ({}, None))
    how = asdict(max(forms, key=forms.count))
    return how | {"max_abs_diff": found[name].tuned, "agreement": agreement, "metrics": metrics}


def _with_the_rest(pretrained: Pretrained, tuned: TunedModel, inputs: Inputs) -> tuple[nn.Module, nn.Module]:
    for_onnx(pretrained.model)
    return pretrained.model, rest(tuned, trace(pretrained.module, inputs, modes=("eval",)))


def _from_checkpoint(spec: Spec, folder: Path) -> tuple[nn.Module, nn.Module]:
    pretrained = load_merged(spec, folder)
    for_onnx(pretrained.model)
    return pretrained.model.eval(), pretrained.module.eval()


def load_tuned(spec: Spec, run: Path) -> tuple[Pretrained, Any, Inputs, TracedModel, TunedModel]:
    """The base of a run, its processor, examples of what it reads, its eval graph, and that with the run's adapter."""
    pretrained, passes = load_model(spec), spec.train.passes
    processor = processor_of(spec, pretrained)
    set_ends(pretrained.model, spec.task.ends(spec.columns, processor))
    inputs = spec.task.inputs(pretrained.model, processor=processor)
    traced = trace(pretrained.module, inputs, ("eval",), passes.off, keep=spec.model.kept)
    tuned = load_adapter(traced, run / "adapter", without=passes.off, also=passes.on)
    return pretrained, processor, inputs, traced, tuned


def longest_of(pretrained: Pretrained, tuned: TunedModel | None = None) -> int | None:
    """The longest sequence of tokens that a model takes, together with what transforms put before it; None: any."""
    own = getattr(pretrained.model.config.get_text_config(), "max_position_embeddings", None)
    bounds = (own, positions(pretrained.model), tuned.longest if tuned else None)
    return min((most - (tuned.taken if tuned else 0) for most in bounds if most), default=None)


def _write(truth: compare.Truth, model: _Model, again: _Again, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Write the float32 file, with a cache if it can have one, and what lies beside it.

    Returns:
        The file, and whether it has a cache and why not.
    """
    spec = truth.spec
    folder.mkdir()
    save_processor(model.processor, folder, spec.task)
    model.config.save_pretrained(folder)
    file = folder / VARIANTS[PLAIN].file
    how = (spec.export.onnx.opset, model.metadata, spec.train.passes.off)
    cache = _with_cache(truth, model, again, file, how) if spec.task.decodes else {"holds": False, "reason": None}
    if not cache["holds"]:
        for one in files_of(file):
            one.unlink()
        export_onnx(again()[1], model.inputs, file, *how)
    gc.collect()
    return file, _in_parts(truth, model, again, file, how) if spec.task.writes and not spec.task.decodes else cache


_KEEPS_NONE = "the model keeps no keys and values that can be handed on"


def _with_cache(truth: compare.Truth, model: _Model, again: _Again, file: Path, how: tuple) -> dict[str, Any]:
    """Write a decoder that reads and returns keys and values, if the model is one that can.

    Args:
        how: further arguments of `export_onnx`.

    Returns:
        Whether it holds, and why not.
    """
    try:
        found = decoder_of(again()[0], model.inputs, model.rest)
        if found is None:
            return {"holds": False, "reason": _KEEPS_NONE}
        decoder, examples, called = found
        export_onnx(decoder, examples, file, *how, called)
        del found, decoder
        gc.collect()
        why = _far(truth, decoding_stage(open_file(file)))
    except SubspanError as error:
        why = str(error)
    return {"holds": why is None, "reason": why}


def _far(truth: compare.Truth, stage: Stage) -> str | None:
    """Why what is decoded with a cache is too far from the tuned model, if it is."""
    return truth.far("decoding", *truth.distances({"decoding": stage}, truth.tally(["decoding"])))


def _in_parts(truth: compare.Truth, model: _Model, again: _Again, whole: Path, how: tuple) -> dict[str, Any]:
    """Write an encoder-decoder as two files with a cache beside the whole one, if the model is one that can.

    Args:
        how: further arguments of `export_onnx`.

    Returns:
        Whether they hold, and why not.
    """
    if model.rest:
        return {"holds": False, "reason": "what can't merge stands in a graph without a cache"}
    files = [whole.with_name(name) for name in encoder_decoder.FILES]
    try:
        parts = encoder_decoder.parts_of(again()[0], model.inputs)
        if parts is None:
            return {"holds": False, "reason": _KEEPS_NONE}
        for file, (module, examples, called) in zip(files, parts, strict=True):
            export_onnx(module, examples, file, *how, called)
        del parts, module
        gc.collect()
        outputs = [value.name for value in onnx_ir.load(whole).graph.outputs]
        why = _far(truth, encoder_decoder.decoding_stage(*map(open_file, files), outputs))
    except SubspanError as error:
        why = str(error)
    for one in (one for file in files for one in files_of(file) if why is not None):
        one.unlink()
    return {"holds": why is None, "reason": why}


def _timed(
    spec: Spec,
    model: _Model,
    again: _Again,
    offered: list[dict[str, Any]],
    shapes: list[tuple[int, int]],
    steps: bool,
    target: str,
) -> dict[str, dict[str, float]]:
    """As `timed`, at batch sizes and lengths.

    Args:
        steps: time a decoder's last token after all others too.
    """
    whole, shipped = again()
    batches = {f"{b}x{n}": spec.task.inputs(whole, b, n, model.processor).kwargs for b, n in shapes}
    last = {f"{name} step": {**one, "input_ids": one["input_ids"][:, -1:]} for name, one in batches.items() if steps}
    return timed(offered, shipped, batches | last, target)


def _truth(
    spec: Spec, run: Path, pretrained: Pretrained, traced: TracedModel, tuned: TunedModel, inputs: Inputs, folder: Path
) -> compare.Truth:
    """What the run's stages are compared with; the tuned model's outputs are kept in a folder."""
    graph, own = traced.graphs["eval"], next(tuned.parameters()).dtype
    # Nothing is shipped wider than float32: the rounding that counts is that of float32.
    narrow = own == torch.float64
    reference = torch_stage(compare.retyped(tuned, torch.float32), torch.float32) if narrow else torch_stage(tuned)
    wide, eps, dtype = None, None, compare.wider(tuned)
    if spec.export.verify.atol is None:
        wide = compare.run_wide(torch_stage(compare.retyped(tuned, dtype), dtype))
        eps = torch.finfo(torch.float32 if narrow else own).eps
    per = compare.elements(graph, spec.data.max_length if spec.data else 0)
    rows, why = _rows(spec, run, pretrained, traced, tuned, per)
    random = _usable(reference, list(random_inputs(spec, pretrained, inputs, tuned)), why)
    samples = [("the random inputs", 0, batch, {}) for batch in random]
    samples += list(compare.batches_of(rows, tuned.input_names, 0, rows.wider)) if rows else []
    kept, axes = list(compare.recorded(reference, wide, samples, folder)), compare.sequences(graph, traced.input_names)
    stored: dict[int, float] = {}
    if eps is not None:
        merged = {site.place for site in tuned.plan.sites if site.merges and site.layout}
        once = compare.run_wide(torch_stage(compare.retyped(tuned, dtype, merged, eps), dtype))
        stored = compare.distances(kept[: len(random)], {"stored": once}, axes)[0]["stored"].wide
    return compare.Truth(
        spec,
        tuned.input_names,
        tuned.signatures["eval"].outputs,
        compare.is_half(tuned),
        kept,
        rows,
        why,
        axes,
        eps,
        stored,
    )


def _compared(truth: compare.Truth, stages: Mapping[str, Stage]) -> dict[str, Any]:
    """The content of verify.json, less what merging says.

    Raises:
        SubspanError: a stage is too far from the tuned model, or decides otherwise.
    """
    spec, rows, atol = truth.spec, truth.rows, truth.spec.export.verify.atol
    tally = truth.tally(stages)
    found, scale = truth.distances(stages, tally)
    worst = {name: one.tuned for name, one in found.items() if name != "tuned"}
    if atol is not None and not max(worst.values(), default=0.0) <= atol:
        said = ", ".join(f"{name} {value:.2e}" for name, value in worst.items())
        raise SubspanError(
            f"outputs differ from the tuned model's by more than export.verify.atol = {atol:g}: {said}; nothing is "
            "written"
        )
    if atol is None and (said := compare.too_far(found, scale, truth.eps, truth.stored)):
        raise SubspanError(said)
    measures = truth.measured(stages, tally)
    if rows:
        half = truth.half or spec.train.precision != "float32"
        compare.check_measured(spec, measures, rows, half)
    counts = {
        "random": sum(len(next(iter(one.inputs.values()))) for one in truth.samples if not one.targets),
        "compared": min(len(rows.encoded), rows.wider * rows.size) if rows else 0,
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


def _rows(
    spec: Spec, run: Path, pretrained: Pretrained, traced: TracedModel, tuned: TunedModel, per: int
) -> tuple[compare.Rows | None, str | None]:
    """The validation rows of a run, or why there are none.

    Args:
        per: the most numbers that a row has in an output.
    """
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
    encoded = referred(traced, spec, encoded, collate)
    own = read_json(file).get("validation")
    if not isinstance(own, dict) or not isinstance(own.get(spec.compared, ""), int | float | None):
        raise SubspanError(f"{file}: not the metrics of this run")
    most = max(1, min(compare.WIDE_ROWS, compare.BATCH_NUMBERS // per))
    size = min(spec.train.batch_size, most)
    kept = max(size, min(compare.WIDE_ROWS, compare.KEPT_NUMBERS // per))
    return compare.Rows(encoded, collate, size, most, -(-kept // size), load_predictions(run), own), None


def load_merged(spec: Spec, folder: Path) -> Pretrained:
    """The checkpoint as anyone would load it."""
    plain = {"gguf": None, "revision": None, "quantise": None}
    model = spec.model.model_copy(update={"name": str(folder.absolute()), **plain})
    return load_model(spec.model_copy(update={"model": model}))


def random_inputs(spec: Spec, pretrained: Pretrained, inputs: Inputs, tuned: TunedModel) -> Any:
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
