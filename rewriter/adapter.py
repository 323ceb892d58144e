"""The adapter: the tuned tensors with a manifest that ties them to the base weights they were tuned for."""

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

from .errors import SubspanError
from .files import aside, load_into, load_tensors, save_tensors
from .plan import Plan, plan
from .rewrite import chosen_indices, rewrite, tuned_parameters
from .spec import Rule, Spec
from .trace import GraphModel, assign

FORMAT = 1
TENSORS, MANIFEST = "adapter.safetensors", "adapter.json"
BASE = "base."


def fingerprint(model: GraphModel, new: tuple[str, ...] = ()) -> str:
    """SHA-256 over names, types, shapes and bytes of the frozen parameters; newly made ones apart, tied ones once."""
    digest = hashlib.sha256()
    named = dict(model.named_parameters(remove_duplicate=False))
    for name in sorted(set(model.aliases.values()) - set(new)):
        tensor = named[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _random(plan: Plan) -> list[str]:
    """Newly made parameters whose start value is still part of the result."""
    replaced = {
        site.place for site in plan.sites if site.layout and site.block is None and site.chain[0][0].name == "full"
    }
    return [name for name in plan.new if name not in replaced]


def _tensors(model: GraphModel) -> dict[str, torch.Tensor]:
    base = dict(model.named_parameters(remove_duplicate=False))
    return tuned_parameters(model) | chosen_indices(model) | {BASE + name: base[name] for name in _random(model.plan)}


def save_adapter(
    model: GraphModel, folder: str | Path, spec: Spec | None = None, metrics: dict[str, Any] | None = None
) -> None:
    """Write `adapter.safetensors` and `adapter.json` into `folder`, whole or not at all.

    The tensors are the tuned ones with the indices of chosen entries, and the start values of newly made parameters
    that no `full` replaces.

    Args:
        model: from `rewrite`.
        spec: the whole spec, for the manifest; without it the rules alone are written.
        metrics: written into the manifest.

    Raises:
        OSError: no space, no permission.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    plan = model.plan
    tensors = _tensors(model)
    manifest = {
        "format": FORMAT,
        "base": fingerprint(model, plan.new),
        "new": list(plan.new),
        "given": plan.given,
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
        (place / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    try:
        own = version("subspan")
    except PackageNotFoundError:
        own = "unknown"
    libraries = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"subspan": own, "python": platform.python_version(), **libraries}


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """`adapter.json` of an adapter.

    Raises:
        SubspanError: it is missing, broken, or of another format.
    """
    file = Path(folder) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise SubspanError(f"{file}: format {manifest['format']}, this version reads {FORMAT}")
        manifest["rules"] = [Rule.model_validate(rule) for rule in manifest["rules"]]
        given = manifest.get("given", {}).items()
        manifest["given"] = {step: {key: int(value) for key, value in sizes.items()} for step, sizes in given}
        manifest["base"], manifest["new"] = str(manifest["base"]), [str(name) for name in manifest["new"]]
    except FileNotFoundError:
        raise SubspanError(f"{file}: no such file; is training finished?") from None
    except json.JSONDecodeError as error:
        raise SubspanError(f"{file}:{error.lineno}:{error.colno}: broken JSON: {error.msg}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SubspanError(f"{file}: not an adapter's manifest ({str(error).splitlines()[0]})") from None
    return manifest


def load_adapter(model: GraphModel, folder: str | Path) -> GraphModel:
    """Rewrite a traced model by an adapter's rules and load its tensors.

    Args:
        model: a traced model with the base weights the adapter was tuned for.

    Raises:
        SubspanError: the adapter is missing or truncated, or made for other base weights.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    new = tuple(manifest["new"])
    if fingerprint(model, new) != manifest["base"]:
        raise SubspanError(f"{folder / MANIFEST}: tuned for other base weights than this model has")
    found = plan(model, manifest["rules"], new, given=manifest["given"])
    stored = load_tensors(folder / TENSORS)
    if random := _random(found):
        model = model.clone()
        assign(model, {name: stored[BASE + name] for name in random if BASE + name in stored})
    # Only so that nothing has to be chosen again; what the file holds is checked and loaded below.
    chosen = {
        leaf.name: torch.zeros(leaf.shape) for site in found.sites for leaf in site.leaves if leaf.role == "chosen"
    }
    tuned = rewrite(model, found, values=chosen)
    load_into(_tensors(tuned), folder / TENSORS)
    return tuned
