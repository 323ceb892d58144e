"""The adapter: the tuned tensors with a manifest that ties them to the base weights they were tuned for."""

import json
import platform
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..errors import SpecError, SubspanError
from ..files import aside, digest, load_into, load_tensors, read_json, save_tensors
from ..graph.traced import TracedModel, assign
from ..plan import Plan, plan
from ..rewrite import rewrite
from ..spec import Rule, Spec, decisive
from ..transforms import TRANSFORMS
from ..tuned import TunedModel, adapter_tensors, chosen_tensors, tuned_parameters
from .from_peft import is_peft, tuned_from
from .ties import fingerprint, other_constant, sketches

FORMAT = 1
TENSORS, MANIFEST = "adapter.safetensors", "adapter.json"
BASE = "base."


def newly_made(plan: Plan) -> list[str]:
    """Newly made parameters whose start value is still part of the result."""
    replaced = {site.place for site in plan.sites if site.layout and site.replaces}
    return [name for name in plan.new if name not in replaced]


def _tensors(model: TunedModel) -> dict[str, torch.Tensor]:
    base = dict(model.named_parameters(remove_duplicate=False))
    given = {name: value for name, value in adapter_tensors(model).items() if name in model.given}
    return (
        tuned_parameters(model)
        | chosen_tensors(model)
        | given
        | {BASE + name: base[name] for name in newly_made(model.plan)}
    )


def save_adapter(
    model: TunedModel,
    folder: str | Path,
    spec: Spec | None = None,
    metrics: dict[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
    base: str | None = None,
) -> None:
    """Write `adapter.safetensors` and `adapter.json` into `folder`, whole or not at all.

    The tensors are the tuned ones with what was chosen (indices of entries), constants that were given, and the start
    values of newly made parameters that are still a part of the result.

    Args:
        model: from `rewrite`.
        spec: the whole spec, for the manifest; without it the rules alone are written.
        metrics: written into the manifest.
        files: of the base model, as `base.identity` has them.
        base: the fingerprint of its weights, where that is known.

    Raises:
        OSError: no space, no permission.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    plan = model.plan
    tensors = _tensors(model)
    manifest = {
        "format": FORMAT,
        "base": base or fingerprint(model, plan.new),
        "base_files": dict(files or {}),
        "constants": sketches(model),
        "new": list(plan.new),
        "given": plan.given,
        "transforms": origins(plan),
        "rules": [rule.model_dump(mode="json", by_alias=True) for rule in plan.rules],
        "spec": spec.model_dump(mode="json", by_alias=True) if spec else None,
        "trainable_parameters": plan.trainable_parameters,
        "head_parameters": plan.head_parameters,
        "metrics": metrics or {},
        "versions": _versions(),
    }
    with aside(folder) as (place,):
        place.mkdir()
        save_tensors(tensors, place / TENSORS)
        manifest["tensors"] = digest(place / TENSORS)
        (place / MANIFEST).write_text(_text(manifest), encoding="utf-8")


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def origins(plan: Plan) -> dict[str, dict[str, str]]:
    """Name of a transform -> the package, or file, that it comes from, and its version."""
    used = {one.name: one.origin for rule in plan.rules for one, _ in rule.chain if one.origin}
    return {name: {"package": origin.package, "version": origin.version} for name, origin in used.items()}


def check_transforms(folder: str | Path) -> None:
    """Refuse an adapter of transforms that are not here.

    Raises:
        SubspanError: with the package, or the file, that they came from; or as `read_manifest`.
    """
    file = Path(folder) / MANIFEST
    check_origins(file, _read(file).get("transforms", {}))


def check_origins(file: Path, written: Any) -> None:
    """Refuse what was tuned with transforms that are not here, or are others than here; of another version, warn.

    Args:
        file: that says so.
        written: as `origins` gives it.

    Raises:
        SubspanError: as `check_transforms`.
    """
    if not isinstance(written, dict) or not all(isinstance(origin, dict) for origin in written.values()):
        raise SubspanError(f"{file}: not an adapter's manifest (transforms)")
    for name, origin in written.items():
        here = TRANSFORMS[name].origin if name in TRANSFORMS else None
        if here and here.package != "subspan" and asdict(here) != origin:
            text = f"{name!r} of {origin.get('package')} {origin.get('version')}"
            if here.is_file:
                raise SubspanError(f"{file}: tuned with {text}, but here it is {here}: give the file it was tuned with")
            warnings.warn(f"{file}: tuned with {text}, here it is {here}", stacklevel=3)
        if name not in TRANSFORMS:
            package, number = str(origin.get("package")), str(origin.get("version"))
            way = f"give --transforms {package}" if number.startswith("sha256:") else f"pip install {package}=={number}"
            broken = TRANSFORMS.broken.get(package)
            why = f", which can't be loaded: {broken}" if broken else f", which is not here: {way}"
            raise SubspanError(f"{file}: tuned with {name!r} of {package} {number}{why}")


def _versions() -> dict[str, str]:
    try:
        own = version("subspan")
    except PackageNotFoundError:
        own = "unknown"
    libraries = {"torch": torch.__version__, "transformers": version("transformers")}
    return {"subspan": own, "python": platform.python_version(), **libraries}


def check_tied(folder: str | Path, spec: Spec, files: Mapping[str, str]) -> None:
    """Refuse to ship an adapter by another spec than it was tuned with, or on a base model of other files.

    Where the model and the data lie, what is exported and `meta` may differ.

    Args:
        spec: of the run's folder.
        files: as of `save_adapter`, as they are now.

    Raises:
        SubspanError: naming what differs.
    """
    manifest, file = read_manifest(folder), Path(folder) / MANIFEST
    if manifest["spec"] is not None and (odd := _difference(*map(decisive, (manifest["spec"], spec)))):
        raise SubspanError(f"{file}: tuned with another {odd} than the run's spec.yaml has now; set it back")
    for name, then in manifest["base_files"].items():
        if files.get(name) != then:
            raise SubspanError(f"{file}: tuned for a base model with another {name}")
    if manifest["base_files"] and (more := sorted(files.keys() - manifest["base_files"].keys())):
        raise SubspanError(f"{file}: tuned for a base model without {more[0]}")


def _difference(one: Any, other: Any, path: str = "") -> str | None:
    """The first place in which two specs differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        found = (_difference(one[key], other[key], f"{path}.{key}" if path else str(key)) for key in one)
        return next((place for place in found if place), None)
    return path if one != other else None


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """`adapter.json` of an adapter.

    Raises:
        SubspanError: it is missing, broken, or of another format.
    """
    file = Path(folder) / MANIFEST
    manifest = _read(file)
    try:
        if manifest["format"] != FORMAT:
            raise SubspanError(f"{file}: format {manifest['format']}, this version reads {FORMAT}")
        check_origins(file, manifest.get("transforms", {}))
        manifest["rules"] = [Rule.model_validate(rule) for rule in manifest["rules"]]
        given = manifest.get("given", {}).items()
        manifest["given"] = {step: {key: int(value) for key, value in sizes.items()} for step, sizes in given}
        manifest["spec"] = Spec.model_validate(manifest["spec"]) if manifest.get("spec") else None
        manifest["base"], manifest["new"] = str(manifest["base"]), [str(name) for name in manifest["new"]]
        # Up to version 0.1 neither was written.
        manifest["base_files"], manifest["constants"] = (dict(manifest.get(k, {})) for k in ("base_files", "constants"))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError, SpecError) as error:
        raise SubspanError(f"{file}: not an adapter's manifest ({str(error).splitlines()[0]})") from None
    return manifest


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise SubspanError(f"{file}: no such file; is training finished?")
    return read_json(file)


def load_adapter(
    model: TracedModel,
    folder: str | Path,
    name: str = "",
    without: Collection[str] = (),
    also: Collection[str] = (),
) -> TunedModel:
    """Rewrite a traced model by an adapter's rules and load its tensors; a folder of PEFT's will do too.

    Args:
        model: a traced model with the base weights the adapter was tuned for, or a tuned one, which then holds this
            adapter too and uses it.
        name: of the adapter in a tuned model.
        without, also: passes, as of `rewrite`.

    Raises:
        SubspanError: the adapter is missing or truncated, made for other base weights, or of transforms that are not
            here; the name is taken.
    """
    if isinstance(model, TunedModel):
        model.hold(name, load_adapter(model.base, folder, without=without, also=also))
        model.use(name)
        return model
    folder = Path(folder)
    if is_peft(folder):
        tuned, notes = tuned_from(model, folder, (), without, also)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        return tuned
    manifest = read_manifest(folder)
    new = tuple(manifest["new"])
    if fingerprint(model, new) != manifest["base"]:
        raise SubspanError(f"{folder / MANIFEST}: tuned for other base weights than this model has")
    if unknown := sorted(set(new) - model.aliases.keys()):
        raise SubspanError(f"{folder / MANIFEST}: {unknown[0]!r}, newly made when it was tuned, is no parameter here")
    try:
        found = plan(model, manifest["rules"], new, given=manifest["given"])
    except SpecError as error:
        raise SubspanError(f"{folder / MANIFEST}: its rules do not fit this model: {error.message}") from None
    stored = load_tensors(folder / TENSORS)
    if random := newly_made(found):
        model = model.clone()
        assign(model, {name: stored[BASE + name] for name in random if BASE + name in stored})
    # Only so that nothing has to be chosen again; what the file holds is checked and loaded below.
    chosen = {
        leaf.name: torch.zeros(leaf.shape) for site in found.sites for leaf in site.leaves if leaf.role == "chosen"
    }
    constants = {leaf.name for site in found.sites for leaf in site.leaves if leaf.role == "constant"}
    given = {name: stored[name] for name in constants & stored.keys()}
    tuned = rewrite(model, found, values=chosen | given, without=without, also=also)
    load_into(_tensors(tuned), folder / TENSORS)
    _check_chosen(tuned, folder / TENSORS)
    if manifest.get("tensors") not in (None, digest(folder / TENSORS)):
        raise SubspanError(f"{folder / TENSORS}: not the file that its {MANIFEST} was written with")
    if other := other_constant(tuned, manifest["constants"]):
        said = f"tuned beside another {other} than is computed here from the base weights"
        raise SubspanError(f"{folder / MANIFEST}: {said}: it can be exported where it was tuned")
    return tuned


def _check_chosen(tuned: TunedModel, file: Path) -> None:
    """Refuse indices that lead nowhere, or to one place twice.

    Raises:
        SubspanError: naming the tensor.
    """
    values = chosen_tensors(tuned)
    for leaf in (leaf for site in tuned.plan.sites for leaf in site.leaves if leaf.role == "chosen"):
        value = values[leaf.name].flatten(0, -2) if values[leaf.name].ndim > 1 else values[leaf.name].unsqueeze(0)
        if leaf.below is not None and bool(((value < 0) | (value >= leaf.below)).any()):
            raise SubspanError(f"{file}: {leaf.name} has an entry out of range: they are 0 to {leaf.below - 1}")
        if leaf.distinct and any(len(row.unique()) < len(row) for row in value):
            raise SubspanError(f"{file}: {leaf.name} names one place twice")
