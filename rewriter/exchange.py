"""Adapters from others and for others: a folder of PEFT becomes a run, a run's adapter a folder of PEFT."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import fit as fitting
from .adapters.from_peft import CONFIG, TASK_TYPES, modules_of, tuned_from
from .adapters.store import check_tied, save_adapter
from .data import encode, load_rows
from .errors import SubspanError
from .files import read_json, write_json, write_text
from .folder import LOCK, MARKER, check_folder, claimed, clear, spec_of
from .gguf import files_of
from .graph.traced import TracedModel
from .plan import Plan
from .pretrained import Pretrained, collator, load_model
from .session import example_inputs
from .spec import Spec, dump_spec, load_spec
from .trace import trace
from .training.checkpoint import save_predictions
from .training.evaluation import predict
from .transforms import TRANSFORMS
from .tuned import TunedModel


def import_peft(
    folder: str | Path,
    out: str | Path,
    base: str,
    task: str,
    settings: Sequence[str] = (),
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda note: None,
) -> Plan:
    """Make a run of a folder that PEFT wrote: spec.yaml, plan.json and adapter/, with the outputs that PEFT's have.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        out: folder of the run.
        base: the base model, as `model.name` of a spec.
        task: as `model.task` of a spec.
        settings: `key=value` of the spec, e.g. `model.labels=[negative,positive]`.
        overwrite: first delete the run that is in `out`.
        tell: takes what is good to know.

    Raises:
        SubspanError: the folder is no adapter of PEFT's, says what no transform can, or is of another model.
    """
    folder, out = Path(folder), Path(out)
    if not (folder / CONFIG).is_file():
        raise SubspanError(f"{folder}: no adapter of PEFT's is there: it has no {CONFIG}")
    found, _, _ = modules_of(folder)
    first = found[0]
    rule = {"target": f"{first.module}.weight", "apply": [{first.transform.name: first.options}]}
    spec = _spec({"version": 1, "model": {"name": base, "task": task}, "rules": [rule]}, settings)
    written, here = read_json(folder / CONFIG).get("task_type"), TASK_TYPES.get(spec.task.auto)
    if written and written != here:
        raise SubspanError(f"{folder / CONFIG}: task_type {written}, and --task {task} is {here or 'none of PEFT’s'}")
    check_folder(spec, out, False, overwrite)
    pretrained, traced, new = _base(spec)
    tuned, notes = tuned_from(traced, folder, new)
    held = {site.place for site in tuned.plan.sites if site.replaces}
    if random := sorted((pretrained.new | pretrained.missing) & traced.read() - held):
        raise SubspanError(f"{random[0]} is neither in {base} nor in {folder}: it would be random")
    spec = spec.model_copy(update={"rules": list(tuned.plan.rules)})
    for note in notes:
        tell(note)
    _write(spec, tuned, out, overwrite, pretrained)
    return tuned.plan


def _base(spec: Spec) -> tuple[Pretrained, TracedModel, tuple[str, ...]]:
    """A spec's model, its eval graph, and the names of its newly made parameters there."""
    pretrained = load_model(spec)
    traced = trace(pretrained.module, example_inputs(spec, pretrained)["eval"], ("eval",), keep=spec.model.kept)
    return pretrained, traced, tuple(sorted(pretrained.new & traced.aliases.keys()))


def fit_to(
    spec: str | Path,
    tuned: str | Path,
    out: str | Path,
    methods: Sequence[str] = (),
    ranks: Sequence[int] = (2, 8),
    error: float = 0.5,
    settings: Sequence[str] = (),
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Make a run of what a full fine-tuning changed: at each weight the method with the fewest parameters that comes
    within `error` of it (the nearest where none does), its values fitted. Eq. (2)

    Args:
        spec: its base model, task, labels and data; its rules are not read.
        tuned: folder of the fully fine-tuned checkpoint of that base.
        out: folder of the run; fit.json has the table.
        methods: transforms to try; all by default.
        ranks: of those that have one.
        error: of ||phi(W) - W*|| over ||W* - W||.
        settings, overwrite, tell: as of `import_peft`.

    Returns:
        The content of fit.json: {"methods": [{"method", "options", "parameters", "error"}], "left_out": [reason],
        "weights": {weight: {"method", "options", "error"}}, "not_fitted": {parameter: relative change}, "error",
        "metric", "value"}; the last two with data.

    Raises:
        SubspanError: the checkpoint is of another base, or nothing changed or fits.
    """
    out, loaded = Path(out), load_spec(spec, list(settings))
    if unknown := [name for name in methods if name not in TRANSFORMS]:
        raise SubspanError(f"--method {unknown[0]}: there is none; subspan schema lists all")
    check_folder(loaded, out, False, overwrite)
    pretrained, traced, new = _base(loaded)
    there = loaded.model.model_copy(update={"name": str(Path(tuned).absolute()), "gguf": None, "revision": None})
    changed = fitting.change(traced, load_model(loaded.model_copy(update={"model": there})).module, new)
    if not changed.matrices:
        raise SubspanError(f"{tuned}: no weight of a linear layer differs from {loaded.model.name}")
    found, report = _tried(traced, changed, methods or list(TRANSFORMS), ranks, tell)
    chosen = fitting.cheapest(found, changed, error)
    model = fitting.as_tuned(traced, changed, found, chosen, new)
    errors = {weight: found[i][1].errors[weight] for weight, i in chosen.items()}
    report["weights"] = {
        weight: {"method": found[i][0].name, "options": found[i][0].options, "error": errors[weight]}
        for weight, i in chosen.items()
    }
    report |= {"error": fitting.total_error(errors, changed), "not_fitted": changed.left}
    loaded = loaded.model_copy(update={"rules": list(model.plan.rules)})
    _write(loaded, model, out, overwrite, pretrained, report)
    return report


def _tried(
    traced: TracedModel,
    changed: fitting.Change,
    methods: Sequence[str],
    ranks: Sequence[int],
    tell: Callable[[str], None],
) -> tuple[list[tuple[fitting.Candidate, fitting.Fitted]], dict[str, Any]]:
    """Every candidate fitted, and the table of them.

    Raises:
        SubspanError: none can be.
    """
    found, report = [], {"methods": [], "left_out": []}
    for one, said in fitting.candidates(traced, sorted(changed.matrices), methods, ranks):
        if one is None:
            report["left_out"].append(said)
            continue
        made = fitting.fit(one, changed)
        count, total = sum(made.parameters.values()), fitting.total_error(made.errors, changed)
        report["methods"].append({"method": one.name, "options": one.options, "parameters": count, "error": total})
        tell(f"{said}: {count:,} parameters, error {total:.4f}")
        found.append((one, made))
    if not found:
        raise SubspanError(f"nothing can be fitted: {'; '.join(report['left_out'])}")
    return found, report


def _write(
    spec: Spec, model: TunedModel, out: Path, overwrite: bool, pretrained: Pretrained, fit: dict[str, Any] | None = None
) -> None:
    """The folder of a run that was not tuned here, with its metric on the validation rows where the spec has data.

    Args:
        fit: content of fit.json, if there is to be one; gets `metric` and `value`.
    """
    measured = None
    if spec.data is not None:
        rows = encode(spec, load_rows(spec, pretrained.labels).validation, pretrained.processor, pretrained.labels)
        measured = predict(model, spec, rows, collator(spec, pretrained, model.input_names))
        if fit is not None:
            fit |= {"metric": spec.compared, "value": measured[0][spec.compared]}
    with claimed(out):
        if overwrite:
            clear(out, (MARKER, LOCK))
        write_text(out / "spec.yaml", dump_spec(spec))
        save_adapter(model, out / "adapter", spec, {}, files_of(spec.model))
        write_json(out / "plan.json", model.plan.to_dict())
        if fit is not None:
            write_json(out / "fit.json", fit)
        if measured is not None:
            write_json(out / "metrics.json", {"validation": {**measured[0], "rows": len(rows)}})
            if measured[1] is not None:
                save_predictions(measured[1], out)


def export_adapter(
    run: str | Path, low_rank: bool = False, rank: int | None = None, error: float = 0.01
) -> dict[str, Any]:
    """Write a run's adapter as a folder of PEFT, RUN/peft, or with every change as a low-rank term, RUN/peft-lora.

    Args:
        run: its folder.
        low_rank: the exact change where the algebra bounds its rank; else the nearest one on the inputs that the layers
            have on the run's training rows.
        rank: the largest; default: what `error` needs.
        error: of a layer's change on its inputs, relative.

    Returns:
        What was written: `folder`; `largest`, the largest difference when read back; for low-rank terms `sites` (weight
        -> r, exact, error, norm), and with data `metric`, `before`, `after`.

    Raises:
        SubspanError: PEFT has no such adapter (it names the site), or the metric falls by more than 0.02.
    """
    from .export.adapter import ship_adapter  # onnx and ONNX Runtime come with it.

    run = Path(run)
    spec = spec_of(run)
    with claimed(run, made=False):
        check_tied(run / "adapter", spec, files_of(spec.model))
        return ship_adapter(spec, run, low_rank, rank, error)


def export_swappable(run: str | Path, others: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Write RUN/swappable: model.onnx, the base with every tuned tensor as an optional input whose default leaves the
    base as it is, and `<run>.onnx_adapter` for this run and the others.

    Args:
        run: its folder.
        others: folders of further runs on the same base.

    Returns:
        `folder`, `adapters` (name -> largest difference from the run) and, where no head is newly made, `base`.

    Raises:
        SubspanError: runs of another base or of one name, what has no default or no operator in ONNX (solvers), or a
            difference beyond rounding.
    """
    from .export.swappable import ship_swappable  # onnx and ONNX Runtime come with it.

    run, runs = Path(run), {}
    for one in map(Path, (run, *others)):
        if (name := one.resolve().name) in runs:
            raise SubspanError(f"two runs are called {name}, and so would be their adapters")
        runs[name] = (spec_of(one), one)
    with claimed(run, made=False):
        for spec, one in runs.values():
            check_tied(one / "adapter", spec, files_of(spec.model))
        return ship_swappable(runs, run / "swappable") | {"folder": str(run / "swappable")}


def _spec(written: dict, settings: Sequence[str]) -> Spec:
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "spec.yaml"
        file.write_text(json.dumps(written))
        return load_spec(file, list(settings))
