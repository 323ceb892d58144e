"""Adapters from others and for others: a folder of PEFT becomes a run, a run's adapter a folder of PEFT."""

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from . import fit as fitting
from .adapters.from_peft import CONFIG, TASK_TYPES, modules_of, tuned_from
from .adapters.store import check_tied, save_adapter
from .adapters.ties import fingerprint
from .data import encode, load_rows
from .errors import SpecError, SubspanError
from .files import read_json, write_json, write_text
from .folder import LOCK, MARKER, check_folder, claimed, clear, spec_of
from .gguf import files_of
from .graph.traced import TracedModel, assign
from .plan import Plan
from .pretrained import Pretrained, collator, load_model
from .session import example_inputs
from .sources import absent
from .spec import Spec, dump_spec, load_spec
from .trace import trace
from .training.checkpoint import save_predictions
from .training.evaluation import Rows, predict, referred
from .transforms import TRANSFORMS
from .tuned import TunedModel

FITTED, COMBINED = "fit.json", "combine.json"


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
    check_folder(spec, out, None, overwrite)
    pretrained, traced, new = _base(spec)
    tuned, notes = tuned_from(traced, folder, new)
    held = {site.place for site in tuned.plan.sites if site.replaces}
    if random := sorted((pretrained.new | pretrained.missing) & traced.read() - held):
        raise SubspanError(f"{random[0]} is neither in {base} nor in {folder}: it would be random")
    spec = spec.model_copy(update={"rules": list(tuned.plan.rules)})
    if pretrained.labels and all(one == f"LABEL_{i}" for i, one in enumerate(pretrained.labels)):
        notes.append(f"labels are {', '.join(pretrained.labels)}; --set model.labels=[...] gives their names")
    for note in notes:
        tell(note)
    _write(spec, tuned, out, overwrite, _measured(spec, pretrained, tuned, _validation(spec, pretrained, traced)))
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
        The content of fit.json: {"methods": [{"method", "options", "parameters", "error", "value"}], "left_out":
        [reason], "weights": {weight: {"method", "options", "error"}}, "not_fitted": {parameter: relative change},
        "error", "metric", "value"}; `metric` and `value`, on the validation rows, with data.

    Raises:
        SubspanError: the checkpoint is of another base, or nothing changed or fits.
    """
    out, loaded = Path(out), load_spec(spec, list(settings))
    if unknown := [name for name in methods if name not in TRANSFORMS]:
        raise SubspanError(f"--method {unknown[0]}: there is none; subspan schema lists all")
    check_folder(loaded, out, None, overwrite)
    pretrained, traced, new = _base(loaded)
    plain = {"gguf": None, "revision": None, "quantise": None}
    there = loaded.model.model_copy(update={"name": str(Path(tuned).absolute()), **plain})
    changed = fitting.change(traced, load_model(loaded.model_copy(update={"model": there})).module, new)
    if not changed.matrices:
        raise SubspanError(f"{tuned}: no weight of a linear layer differs from {loaded.model.name}")
    found, report = _tried(traced, changed, methods or list(TRANSFORMS), ranks, tell)
    rows = _validation(loaded, pretrained, traced)
    for i, entry in enumerate(report["methods"] if rows is not None else ()):
        tell(f"measuring {entry['method']}")
        one = fitting.as_tuned(traced, changed, found, dict.fromkeys(changed.matrices, i), new)
        entry["value"] = _measured(loaded, pretrained, one, rows).metrics[loaded.compared]
    chosen = fitting.cheapest(found, changed, error)
    model = fitting.as_tuned(traced, changed, found, chosen, new)
    errors = {weight: found[i][1].errors[weight] for weight, i in chosen.items()}
    report["weights"] = {
        weight: {"method": found[i][0].name, "options": found[i][0].options, "error": errors[weight]}
        for weight, i in chosen.items()
    }
    report |= {"error": fitting.total_error(errors, changed), "not_fitted": changed.left}
    if measured := _measured(loaded, pretrained, model, rows):
        report |= {"metric": loaded.compared, "value": measured.metrics[loaded.compared]}
    loaded = loaded.model_copy(update={"rules": list(model.plan.rules)})
    _write(loaded, model, out, overwrite, measured, report, FITTED)
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
            tell(f"left out: {said}")
            continue
        made = fitting.fit(one, changed)
        count, total = sum(made.parameters.values()), fitting.total_error(made.errors, changed)
        report["methods"].append({"method": one.name, "options": one.options, "parameters": count, "error": total})
        tell(f"{said}: {count:,} parameters, error {total:.4f}")
        found.append((one, made))
    if not found:
        raise SubspanError(f"nothing can be fitted: {'; '.join(report['left_out'])}")
    return found, report


class _Measured(NamedTuple):
    """What validation rows say of a model: metrics by name, what they were measured by, and how many rows."""

    metrics: dict[str, float]
    predictions: np.ndarray | None
    rows: int


def _measured(spec: Spec, pretrained: Pretrained, model: TracedModel, rows: Rows | None) -> _Measured | None:
    """None where there are no rows."""
    if rows is None:
        return None
    return _Measured(*predict(model, spec, rows, collator(spec, pretrained, model.input_names)), len(rows))


def _write(
    spec: Spec,
    model: TunedModel,
    out: Path,
    overwrite: bool,
    measured: _Measured | None,
    report: dict[str, Any] | None = None,
    name: str = "",
) -> None:
    """The folder of a run that was not tuned here.

    Args:
        report: content of the file `name`, if there is to be one.
    """
    with claimed(out):
        if overwrite:
            clear(out, (MARKER, LOCK))
        write_text(out / "spec.yaml", dump_spec(spec))
        save_adapter(model, out / "adapter", spec, {}, files_of(spec.model))
        write_json(out / "plan.json", model.plan.to_dict())
        if report is not None:
            write_json(out / name, report)
        if measured is not None:
            write_json(out / "metrics.json", {"validation": {**measured.metrics, "rows": measured.rows}})
            if measured.predictions is not None:
                save_predictions(measured.predictions, out)


def _validation(spec: Spec, pretrained: Pretrained, traced: TracedModel) -> Rows | None:
    """The validation rows of a spec that has data, and has it here.

    Args:
        traced: the base.
    """
    if spec.data is None or absent(spec.data):
        return None
    try:
        rows = encode(spec, load_rows(spec, pretrained.labels).validation, pretrained.processor, pretrained.labels)
    except SpecError as error:
        raise SubspanError(f"{'.'.join(map(str, error.path))}: {error.message}".removeprefix(": ")) from None
    return referred(traced, spec, rows, collator(spec, pretrained, traced.input_names))


def combine_runs(
    runs: Sequence[str | Path],
    weights: Sequence[float],
    out: str | Path,
    how: str = "linear",
    density: float | None = None,
    rank: int | None = None,
    error: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Make a run of the changes of several runs on one base, whatever their methods: see `export.combine.combined`.
    Newly made parameters are the first run's, as are task, labels and data.

    Args:
        runs: their folders.
        weights: one for each run, or one for all.
        out: folder of the run; combine.json has what is returned.
        how: `linear`, `ties`, `dare_linear` or `dare_ties`.
        density: of all but `linear`, in (0, 1].
        rank, error: the result as low-rank terms, as of `export_adapter`; without both every entry of what changed.
        seed, overwrite, tell: of what is kept at random; as of `import_peft`.

    Returns:
        {"how", "density", "seed", "runs": [{"run", "weight", with data "metric", "alone", "combined"}]}, with low-rank
        terms "sites" as of `export_adapter`. `combined` is measured under a run's own head.

    Raises:
        SubspanError: a run's change is none of weights, the bases differ, or the settings do not fit.
    """
    from .export import combine  # onnx and ONNX Runtime come with what loads a run.
    from .export.low_rank import as_low_rank, said_of

    folders, out = [Path(run) for run in runs], Path(out)
    weights = _each(weights, len(folders), how, density)
    if out.resolve() in [folder.resolve() for folder in folders]:
        raise SubspanError(f"--out {out}: is one of the runs that are combined")
    _check_terms(rank, error)
    specs = [spec_of(folder) for folder in folders]
    spec = specs[0]
    check_folder(spec, out, None, overwrite)
    pretrained, traced, new, read, entries = _read_runs(folders, specs, weights, tell)
    report = {"how": how, "density": density, "seed": seed, "runs": entries}
    made = combine.combined([change for change, _ in read], weights, how, density or 1.0, seed)
    model = combine.as_whole(traced, made, read[0][1], new)
    if rank is not None or error is not None:
        tell("looking for low-rank terms")
        seen = _seen(spec, pretrained, traced, model)
        model, terms = as_low_rank(model, traced, rank, 0.01 if error is None else error, seen, made)
        report |= {"calibrated": bool(seen), "sites": said_of(terms)}
    if measured := _measured(spec, pretrained, model, _validation(spec, pretrained, traced)):
        entries[0]["combined"] = measured.metrics[spec.compared]
        report |= {"metric": spec.compared, "value": entries[0]["combined"]}
    _measure_others(specs[1:], [heads for _, heads in read[1:]], entries[1:], combine.shared_of(model), tell)
    spec = spec.model_copy(update={"rules": list(model.plan.rules)})
    _write(spec, model, out, overwrite, measured, report, COMBINED)
    return report


def _seen(spec: Spec, pretrained: Pretrained, traced: TracedModel, model: TunedModel) -> dict[str, Any]:
    """What layers see of the spec's training rows; of a spec without data, nothing."""
    from .export.adapter import seen_by

    if spec.data is None or absent(spec.data):
        return {}
    return seen_by(model, spec, pretrained, traced, load_rows(spec, pretrained.labels).train)


def _check_terms(rank: int | None, error: float | None) -> None:
    if (rank is not None and rank < 1) or not 0 <= (error or 0) <= 1:
        raise SubspanError("--rank is 1 or more, --error in [0, 1]")


def _each(weights: Sequence[float], runs: int, how: str, density: float | None) -> list[float]:
    """A weight for each run.

    Raises:
        SubspanError: the settings of `combine_runs` do not fit.
    """
    from .export.combine import HOWS

    if how not in HOWS:
        raise SubspanError(f"--how {how}: one of {', '.join(HOWS)}")
    if (density is None) != (how == HOWS[0]) or not 0 < (1 if density is None else density) <= 1:
        raise SubspanError(f"--density, in (0, 1], is of {', '.join(HOWS[1:])}, and needed there")
    weights = [*weights] * (runs if len(weights) == 1 else 1)
    if not all(map(math.isfinite, weights)):
        raise SubspanError(f"--weight {next(one for one in weights if not math.isfinite(one))}: is no number")
    if not runs or len(weights) != runs:
        raise SubspanError(f"{len(weights)} weights for {runs} runs: give one for each, or one for all")
    if not any(weights):
        raise SubspanError("--weight 0: of no run anything is left, which is the base")
    return weights


def _read_runs(
    folders: Sequence[Path], specs: Sequence[Spec], weights: Sequence[float], tell: Callable[[str], None]
) -> tuple[Pretrained, TracedModel, tuple[str, ...], list[tuple[dict[str, Tensor], dict[str, Tensor]]], list[dict]]:
    """The first run's base, and of each run the changes, the newly made parameters, and its entry in the report."""
    from .export.combine import changes_of, heads_of
    from .export.ship import load_tuned

    first, base, read, entries = None, None, [], []
    for folder, spec, weight in zip(folders, specs, weights, strict=True):
        tell(f"reading {folder}")
        check_tied(folder / "adapter", spec, files_of(spec.model))
        pretrained, _, _, traced, tuned = load_tuned(spec, folder)
        found = fingerprint(traced, tuple(tuned.plan.new))
        if found != (base := base or found):
            raise SubspanError(f"{folder}: of another base than {folders[0]}")
        read.append((changes_of(tuned), heads_of(tuned)))
        entries.append({"run": str(folder), "weight": weight})
        if measured := _measured(spec, pretrained, tuned, _validation(spec, pretrained, traced)):
            entries[-1] |= {"metric": spec.compared, "alone": measured.metrics[spec.compared]}
        first = first or (pretrained, traced, tuple(tuned.plan.new))
    return *first, read, entries


def _measure_others(
    specs: Sequence[Spec],
    heads: Sequence[dict[str, Tensor]],
    entries: Sequence[dict[str, Any]],
    shared: dict[str, Tensor],
    tell: Callable[[str], None],
) -> None:
    """Give the entries of runs with data the metric of the combined weights under their own heads."""
    for spec, own, entry in zip(specs, heads, entries, strict=True):
        if "metric" in entry:
            tell(f"measuring what {entry['run']} tells of")
            pretrained, traced, _ = _base(spec)
            rows = _validation(spec, pretrained, traced)
            assign(traced, shared | own)
            measured = _measured(spec, pretrained, traced, rows)
            entry["combined"] = measured.metrics[spec.compared]


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

    _check_terms(rank, error)
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
