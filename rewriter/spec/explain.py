"""Explain: what pydantic says of a wrong spec, as mistakes in words with their paths."""

import re
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import SpecError
from ..transforms import TRANSFORMS
from .models import Spec, nearest


def dotted(path: tuple[str | int, ...]) -> str:
    out = ""
    for part in path:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else part
    return out


def unknown_transform(name: str) -> str:
    """What to say of a transform that is not registered."""
    message = f"unknown method {name!r}" + (nearest(name, TRANSFORMS) or f"; there are {', '.join(TRANSFORMS)}")
    broken = (f"; those of {package} can't be loaded: {why}" for package, why in TRANSFORMS.broken.items())
    return message + "".join(broken)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def _known_keys(path: tuple[str | int, ...]) -> list[str]:
    models: list[type[BaseModel]] = [Spec]
    for part in path:
        if isinstance(part, str):
            if part in TRANSFORMS and not any(part in m.model_fields for m in models):
                models = [TRANSFORMS[part].options]
                continue
            found = [f.annotation for m in models for n, f in m.model_fields.items() if part in (n, f.alias)]
            models = [model for annotation in found for model in _models(annotation)] if found else []
    return [field.alias or name for model in models for name, field in model.model_fields.items()]


def explained(error: ValidationError, data: Any) -> list[SpecError]:
    """All mistakes, in words, one for each place."""
    problems = error.errors(include_url=False)
    misspelt = {one["loc"][:-1] for one in problems if one["type"] == "extra_forbidden"}
    # A misspelt key often leaves a required one missing: the misspelling is the mistake.
    told = [_explain(one, data) for one in problems if one["type"] != "missing" or one["loc"][:-1] not in misspelt]
    by_path: dict[tuple[str | int, ...], list[SpecError]] = {}
    for one in told:
        by_path.setdefault(one.path, []).append(one)
    return [_either(several) for several in by_path.values()]


def _either(several: list[SpecError]) -> SpecError:
    """One mistake of what each alternative of a union says."""
    first, messages = several[0], list(dict.fromkeys(one.message for one in several))
    expected = [message for message in messages if message.startswith("expected ")]
    message = expected[0] if expected else ", or ".join(messages)
    return SpecError(message, first.path, first.at_key)


def _explain(problem: Mapping[str, Any], data: Any) -> SpecError:
    """One mistake; its path as the user wrote it (pydantic's own steps through unions left out)."""
    path: list[str | int] = []
    place = data
    for part in problem["loc"]:
        if (isinstance(place, dict) and part in place) or (isinstance(place, list) and isinstance(part, int)):
            path.append(part)
            place = place[part]
    kind, context, last = problem["type"], problem.get("ctx", {}), problem["loc"][-1] if problem["loc"] else ""
    if kind == "extra_forbidden":
        known = _known_keys(tuple(path[:-1]))
        message = f"unknown key {last!r}{nearest(str(last), known)}"
        message += f" (known: {', '.join(known)})" if known else ""
        return SpecError(message, (*path[:-1], last), True)
    if kind == "missing":
        return SpecError(f"{last!r} is missing", tuple(path))
    if kind == "unknown_transform":
        name = context["name"]
        at_key = isinstance(place, dict) and name in place
        return SpecError(unknown_transform(name), (*path, name) if at_key else tuple(path), at_key)
    if kind == "no_transform":
        return SpecError(problem["msg"], tuple(path))
    if kind == "value_error":
        return SpecError(str(context["error"]), tuple(path))
    message = problem["msg"][0].lower() + problem["msg"][1:]
    if kind in ("model_type", "model_attributes_type") and (known := _known_keys(tuple(path))):
        message = f"should be keys with values (known: {', '.join(known)})"
    shown = repr(problem["input"])
    if isinstance(problem["input"], str | int | float | bool) and len(shown) < 60:
        message += f", not {shown}"
    if isinstance(problem["input"], str) and re.fullmatch(r"[-+.0-9eE]{1,40}", problem["input"]):
        message += "; write it without quotes"
    message = message.replace("input should be", "should be").replace(" after validation", "")
    return SpecError(message, tuple(path))
