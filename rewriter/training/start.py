"""A run that starts where another one ended: its adapter's tensors in the place of start values."""

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.store import MANIFEST, TENSORS, load_adapter, newly_made, read_manifest
from ..errors import SubspanError
from ..files import aside, read_json
from ..graph.traced import TracedModel, assign
from ..plan import Plan, Site, plan
from ..spec import Spec
from ..transforms import Schedule, WhileTuning
from ..tuned import adapter_tensors
from .checkpoint import resumed_choices
from .schedules import Sizes

STARTED = "started"  # A copy, in the folder of the run: the other run may change, or go.


def started_from(out: Path, resume: bool, start: str | Path | None) -> Path | None:
    """Folder of the adapter that a run starts from, or that the run which is resumed started from; None: of none.

    Args:
        out: folder of the run.
        start: folder of the run it starts from.
    """
    if start is not None:
        return Path(start) / "adapter"
    return out / STARTED if resume and (out / STARTED).is_dir() else None


def keep_start(adapter: Path, out: Path) -> None:
    """Copy an adapter into the folder of the run that starts from it."""
    with aside(out / STARTED) as (place,):
        place.mkdir()
        for name in (MANIFEST, TENSORS):
            shutil.copyfile(adapter / name, place / name)


def check_start(spec: Spec, traced: TracedModel, planned: Plan, adapter: Path) -> None:
    """Refuse to start from a run of another task, other labels, sites or methods, other options but those that count
    while tuning alone, or one that a schedule decided on.

    Args:
        spec: of what is to be tuned.
        traced: the base, on the meta device too.
        planned: what is to be tuned.
        adapter: folder of the run's adapter.

    Raises:
        SubspanError: naming the site, or the key of the spec.
    """
    manifest = read_manifest(adapter)
    if (then := manifest["spec"]) is not None:
        for key in ("task", "labels"):
            if (was := getattr(then.model, key)) != (now := getattr(spec.model, key)):
                raise SubspanError(f"--from: model.{key} is {was} in that run and {now} in the spec")
    start = plan(traced, manifest["rules"], tuple(manifest["new"]), given=manifest["given"])
    here, there = ({site.label: site for site in one.sites} for one in (planned, start))
    for label in dict.fromkeys([*there, *here]):
        both = there.get(label), here.get(label)
        if None in both or _lasting(both[0]) != _lasting(both[1]):
            was, now = ("not tuned" if one is None else one.transform for one in both)
            raise SubspanError(f"--from: {label} is {was} in that run and {now} in the spec: rules have to be the same")
    if scheduled := next((site for site in planned.sites if site.schedules), None):
        raise SubspanError(f"--from: a schedule decided on {scheduled.label}, {scheduled.transform}, in that run")
    if tuple(start.new) != tuple(planned.new):
        raise SubspanError("--from: newly made parameters of that run are others than the spec's")


def _lasting(site: Site) -> list[tuple[str, dict[str, Any]]]:
    """A site's transforms with the options that say something of what is tuned."""
    found = []
    for one, options in site.chain:
        fields = type(options).model_fields
        last = {key for key, info in fields.items() if WhileTuning() not in info.metadata}
        found.append((one.name, options.model_dump(include=last)))
    return found


def start_values(traced: TracedModel, adapter: Path) -> tuple[dict[str, Tensor], frozenset[str]]:
    """The value of every leaf by an adapter, and which constants among them can't be computed again. Newly made
    parameters that no site replaces get the adapter's values in `traced`.

    Raises:
        SubspanError: as `load_adapter`.
    """
    start = load_adapter(traced, adapter)
    assign(traced, {name: start.get_parameter(name).detach() for name in newly_made(start.plan)})
    return {name: value.detach() for name, value in adapter_tensors(start).items()}, start.given


def choices_of(run: Path, found: Plan) -> tuple[Sizes, dict[str, Tensor]] | None:
    """The sizes and places that schedules chose in a run that is to be resumed; None where it has no checkpoint."""
    choices = resumed_choices(run / "checkpoints")
    if choices is None or choices[0] is not None:
        return choices
    # A checkpoint of a version that kept the sizes in plan.json alone.
    pairs = (pair for site in found.sites for pair in site.schedules)
    choosing = {name for name, one in pairs if type(one).choose is not Schedule.choose}
    sites = read_json(run / "plan.json")["sites"]
    given = {step: sizes for site in sites for step, sizes in site["settled"].items() if step in choosing}
    return given, choices[1]
