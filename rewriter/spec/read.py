"""Read: specs from YAML files, their variants and overrides, with the place of every mistake."""

import contextlib
import copy
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from ..errors import LocatedError, ManyErrors, SpecError, SubspanError, UnreachableError, raise_all
from .explain import dotted, explained
from .models import Spec
from .places import YamlError, YamlMap, parse, parse_scalar


class Source:
    """Where a spec came from: turns paths inside it into file, line and column."""

    def __init__(
        self,
        file: str,
        places: YamlMap,
        overrides: dict[tuple[str | int, ...], str],
        variant: tuple[str | int, ...] = (),
    ):
        self.file, self.places, self.overrides, self.variant = file, places, overrides, variant

    def locate(self, error: SpecError) -> SubspanError:
        """`<file>:<line>:<column>: <path>: <message>`, or the --set that is to blame."""
        place = dotted(error.path)
        text = f"{place}: {error.message}" if place else error.message
        for path, argument in self.overrides.items():
            if error.path[: len(path)] == path:
                return SubspanError(f"--set {argument}: {text}")
        path = error.path
        if self.variant:
            own = self.places.data["variants"][self.variant[1]]
            path = (*self.variant, *path) if not path or path[0] in own else path
        reachable = not isinstance(error, UnreachableError)
        return LocatedError(self.file, *self.places.locate(path, error.at_key), text, reachable)


def load_spec(path: str | Path, overrides: list[str] | None = None) -> Spec:
    """Read and validate a spec.

    Args:
        path: a YAML file; `<file>#<row>` for the variant whose meta.row that is.
        overrides: `dotted.key=value` settings; list items by number, e.g. `rules.0.apply.0.lora.rank=4`.

    Raises:
        SubspanError: one line with file, line and column of the first mistake, or the file holds several variants.
    """
    file, mark, row = str(path).rpartition("#")
    if not mark or Path(path).is_file():
        file, mark, row = str(path), "", ""
    specs = load_specs(file, overrides)
    picked = [spec for spec in specs if str(spec.meta.get("row")) == row] if mark else specs
    if len(picked) != 1:
        rows = ", ".join(str(spec.meta.get("row")) for spec in specs[:8])
        raise SubspanError(f"{path}: name one of its variants as {file}#<row>; the first rows are {rows}")
    return picked[0]


def load_specs(path: str | Path, overrides: list[str] | None = None) -> list[Spec]:
    """All specs of a file: one, or one for every variant.

    With `variants`, each of them replaces keys of the spec (its `meta` adds to the spec's). `values: {row: [10, 23],
    rank: [2, 4]}` makes one for every place in the lists; a value `$rank` stands for the rank, or for what `let` says.

    Raises:
        SubspanError: as `load_spec`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LocatedError(str(path), 1, 1, 1, f"not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        raise UnreachableError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        places = parse(text)
    except YamlError as error:
        raise LocatedError(str(path), error.line, error.column, error.width, error.message) from None
    if not isinstance(places.data, dict):
        known = ", ".join(Spec.model_fields)
        raise LocatedError(str(path), *places.locate(()), f"a spec is a mapping with the keys {known}")
    data = copy.deepcopy(places.data)
    source = Source(str(path), places, {})
    specs = []
    for made, place in _variants(data, source):
        arguments = dict(_override(made, argument) for argument in overrides or [])
        specs.append(_validated(made, Source(str(path), places, arguments, place)))
    return specs


def _variants(data: dict, source: "Source") -> Iterator[tuple[dict, tuple[str | int, ...]]]:
    """The specs that a file stands for, and where in it each is written."""
    if "variants" not in data:
        yield data, ()
        return
    variants, let = data.pop("variants"), data.pop("let", {})
    if not (isinstance(variants, list) and variants and isinstance(let, dict)):
        raise source.locate(SpecError("expected a list of variants, and `let` as a mapping", ("variants",)))
    for i, variant in enumerate(variants):
        path = ("variants", i)
        values = variant.pop("values", {}) if isinstance(variant, dict) else None
        lists = list(values.values()) if isinstance(values, dict) else [None]
        if not all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists):
            raise source.locate(SpecError("expected keys of a spec, and `values` as lists of equal length", path))
        if lists and not lists[0]:
            raise source.locate(SpecError("its lists are empty, so there is nothing to run", (*path, "values")))
        for row in zip(*lists, strict=True) if lists else [()]:
            made = copy.deepcopy(data | variant)
            if isinstance(data.get("meta"), dict) and isinstance(variant.get("meta"), dict):
                made["meta"] = data["meta"] | variant["meta"]
            yield _substituted(made, let | dict(zip(values, row, strict=True))), path


def _substituted(value: Any, names: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return {key: _substituted(one, names) for key, one in value.items()}
    if isinstance(value, list):
        return [_substituted(one, names) for one in value]
    return names.get(value[1:], value) if isinstance(value, str) and value.startswith("$") else value


def _validated(data: dict, source: "Source") -> Spec:
    try:
        spec = Spec.model_validate(data)
    except ValidationError as error:
        raise_all([source.locate(one) for one in explained(error, data)])
    except SpecError as error:
        raise source.locate(error) from None
    spec._locate = source.locate
    return spec


@contextlib.contextmanager
def located(spec: Spec) -> Iterator[None]:
    """Give mistakes of a spec their file, line and column."""
    try:
        yield
    except SpecError as error:
        raise spec.locate(error) from None
    except ManyErrors as several:
        raise_all([spec.locate(error) if isinstance(error, SpecError) else error for error in several.errors])


def warned(warning: str) -> SpecError:
    """A warning of a plan as a mistake at its rule, for its place: it starts with `rules[0]: ` if it has one."""
    index = re.match(r"rules\[(\d+)\]: ", warning)
    return SpecError(warning, ("rules", int(index[1]), "target") if index else ("rules",))


def dump_spec(spec: Spec) -> str:
    """The resolved spec as YAML: every default written out."""
    return _written(spec.model_dump(mode="json", by_alias=True, exclude_none=False))


# Which processes share the work, and what stays off a device: a run goes on with others.
_PLACED = {"train": {"parallel"}, "limits": {"weight_memory"}}


def differing(one: Spec, other: Spec) -> list[str]:
    """The settings that two specs differ in, as they are written, but for where the work is done: dotted keys; lists
    are compared whole."""
    first, second = (spec.model_dump(mode="json", by_alias=True, exclude=_PLACED) for spec in (one, other))
    if _written(first) == _written(second):
        return []
    first, second = _flat(first), _flat(second)
    return [key for key in {**first, **second} if first.get(key) != second.get(key)] or ["the order of its keys"]


def _flat(value: Any, place: str = "") -> dict[str, str]:
    """Dotted key -> value as text: 1, 1.0 and true are three."""
    if not isinstance(value, dict) or not value:
        return {place: repr(value)}
    return {key: one for name, part in value.items() for key, one in _flat(part, f"{place}.{name}".lstrip(".")).items()}


def decisive(spec: Spec) -> dict[str, Any]:
    """What of a spec decides what is tuned: less where the model and the data lie, what is exported, which processes
    share the work, and notes."""
    left_out = _PLACED | {"export": True, "meta": True, "limits": True, "model": {"name", "gguf", "revision"}}
    left_out["data"] = {"files": True, "mixture": {"__all__": {"files"}}}
    return spec.model_dump(mode="json", by_alias=True, exclude=left_out)


def is_dump(text: str) -> bool:
    """Whether a text is what `dump_spec` writes, of this version or an earlier one."""
    try:
        data = parse(text).data
    except YamlError:
        return False
    return isinstance(data, dict) and set(data) == set(Spec.model_fields) and _written(data) == text


def _written(data: dict[str, Any]) -> str:
    out = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False
    writer.dump(data, out)
    return out.getvalue()


def _override(data: dict, argument: str) -> tuple[tuple[str | int, ...], str]:
    key, equals, value = argument.partition("=")
    if not equals or not key:
        raise SubspanError(f"--set {argument}: expected key=value, e.g. train.epochs=2")
    path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    try:
        parsed = parse_scalar(value)
    except YamlError as error:
        raise SubspanError(f"--set {argument}: {error.message}") from None
    place: Any = data
    for i, part in enumerate(path):
        last = i == len(path) - 1
        if isinstance(place, list) and isinstance(part, int) and part < len(place):
            if last:
                place[part] = parsed
            place = place[part]
        elif isinstance(place, dict):
            if last:
                place[str(part)] = parsed
            elif place.get(str(part)) is None:
                place[str(part)] = {}
            place = place[str(part)]
        else:
            raise SubspanError(f"--set {argument}: the spec has no {dotted(path[: i + 1])}")
    return path, argument
