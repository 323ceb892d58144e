"""Adapters from others and for others: a folder of PEFT becomes a run, a run's adapter a folder of PEFT."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .adapters.from_peft import CONFIG, TASK_TYPES, modules_of, tuned_from
from .adapters.store import check_tied, save_adapter
from .base import identity
from .errors import SubspanError
from .files import read_json, write_json, write_text
from .folder import LOCK, MARKER, check_folder, claimed, clear, spec_of
from .gguf import location_of
from .plan import Plan
from .pretrained import load_model
from .session import example_inputs
from .spec import Spec, dump_spec, load_spec
from .trace import trace


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
    pretrained = load_model(spec)
    traced = trace(pretrained.module, example_inputs(spec, pretrained)["eval"], ("eval",), keep=spec.model.kept)
    new = tuple(sorted(pretrained.new & traced.aliases.keys()))
    tuned, notes = tuned_from(traced, folder, new)
    held = {site.place for site in tuned.plan.sites if site.replaces}
    if random := sorted((pretrained.new | pretrained.missing) & traced.read() - held):
        raise SubspanError(f"{random[0]} is neither in {base} nor in {folder}: it would be random")
    spec = spec.model_copy(update={"rules": list(tuned.plan.rules)})
    for note in notes:
        tell(note)
    with claimed(out):
        if overwrite:
            clear(out, (MARKER, LOCK))
        write_text(out / "spec.yaml", dump_spec(spec))
        save_adapter(tuned, out / "adapter", spec, {}, _files(spec))
        write_json(out / "plan.json", tuned.plan.to_dict())
    return tuned.plan


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
        check_tied(run / "adapter", spec, _files(spec))
        return ship_adapter(spec, run, low_rank, rank, error)


def _files(spec: Spec) -> dict[str, str]:
    return identity(location_of(spec.model), spec.model.revision or "main")


def _spec(written: dict, settings: Sequence[str]) -> Spec:
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "spec.yaml"
        file.write_text(json.dumps(written))
        return load_spec(file, list(settings))
