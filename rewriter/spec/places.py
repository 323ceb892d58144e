"""YAML with places: plain data by `safe_load` semantics, and the line and column of every key and value."""

import io
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    CollectionEndEvent,
    CollectionStartEvent,
)
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

MAX_NODES = 50_000
MAX_BYTES = 2_000_000
MAX_DEPTH = 50
MAX_NUMBER = 2**64
_SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")}
_CORE = _SCALARS | {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "timestamp")}

Path = tuple[str | int, ...]
Place = tuple[int, int, int]


class YamlError(Exception):
    """Text that is not acceptable YAML; `line` and `column` start at 1."""

    def __init__(self, message: str, line: int = 1, column: int = 1, width: int = 1):
        super().__init__(message)
        self.message, self.line, self.column, self.width = message, line, column, width


@dataclass
class YamlMap:
    """Parsed data with the place of each path's value and key: line and column from 1, width on that line."""

    data: Any
    values: dict[Path, Place] = field(default_factory=dict)
    keys: dict[Path, Place] = field(default_factory=dict)

    def locate(self, path: Path, at_key: bool = False) -> Place:
        """The place of `path`, or of the nearest enclosing path that the text has."""
        if at_key and path in self.keys:
            return self.keys[path]
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path, (1, 1, 1))


def parse(text: str) -> YamlMap:
    """Parse one YAML 1.2 document of mappings, sequences and scalars.

    Raises:
        YamlError: broken syntax, a duplicate or non-string key, a tag beyond the core ones, a value that is none of its
            tag, more than `MAX_NODES` values (aliases expanded), or nesting deeper than `MAX_DEPTH`.
    """
    reader = YAML(typ="safe", pure=True)
    try:
        _check_size(text)
        root = reader.compose(io.StringIO(text))
        if root is None:
            raise YamlError("the file is empty")
        result = YamlMap(None)
        result.data = _build(root, (), result, reader, [0])
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise YamlError(f"broken YAML: {error.problem or error.context}", line, column) from None
    except RecursionError:
        raise YamlError("nested too deeply, or an alias contains itself") from None
    except (YAMLError, ValueError) as error:
        raise YamlError("broken YAML: " + " ".join(str(error).split())) from None
    return result


def _check_size(text: str) -> None:
    """Refuse in time what would take minutes to read."""
    if len(text) > MAX_BYTES:
        raise YamlError(f"larger than {MAX_BYTES:,} characters")
    depth = 0
    for count, event in enumerate(YAML(typ="safe", pure=True).parse(io.StringIO(text))):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        mark = event.start_mark
        if depth > MAX_DEPTH:
            raise YamlError(f"nested more than {MAX_DEPTH} deep", mark.line + 1, mark.column + 1)
        if count > 2 * MAX_NODES:
            raise YamlError(f"more than {MAX_NODES:,} values", mark.line + 1, mark.column + 1)


def parse_scalar(text: str) -> Any:
    """A value as it would be read in a spec, e.g. `2`, `1e-3`, `[a, b]`.

    Raises:
        YamlError: as `parse`.
    """
    return parse(text).data if text.strip() else ""


def _text(value: str, place: Place) -> str:
    """Text whose escaped surrogate pairs, as JSON writes them, are one character each."""
    if value.isascii():
        return value
    try:
        return value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise YamlError("half of a surrogate pair is no character", *place) from None


def _place(node: Node) -> Place:
    start, end = node.start_mark, node.end_mark
    width = end.column - start.column if end.line == start.line else 1
    return start.line + 1, start.column + 1, max(1, width)


def _build(node: Node, path: Path, out: YamlMap, reader: YAML, count: list[int]) -> Any:
    place = _place(node)
    count[0] += 1
    if count[0] > MAX_NODES:
        raise YamlError(f"more than {MAX_NODES:,} values, aliases expanded", *place)
    if node.tag not in _CORE:
        raise YamlError(f"tag {node.tag!r} is not allowed: only plain YAML values are read", *place)
    out.values.setdefault(path, place)
    if isinstance(node, ScalarNode):
        node.value = _text(node.value, place)
        try:
            value = reader.constructor.construct_object(node) if node.tag in _SCALARS else node.value
            if isinstance(value, int) and abs(value) >= MAX_NUMBER:
                raise YamlError("a number of more than 64 bits", *place)
            return value
        except (KeyError, ValueError, OverflowError):
            kind = node.tag.rpartition(":")[2]
            raise YamlError(f"{node.value[:40]!r} can't be read as {kind}", *place) from None
    if isinstance(node, MappingNode):
        data: dict[str, Any] = {}
        for key, value in node.value:
            at = _place(key)
            if key.tag == "tag:yaml.org,2002:merge":
                raise YamlError("merge keys (<<) are not read: write the keys out", *at)
            if not isinstance(key, ScalarNode):
                raise YamlError("a key must be plain text", *at)
            key.value = _text(key.value, at)
            if key.value in data:
                raise YamlError(f"duplicate key {key.value!r}", *at)
            out.keys.setdefault((*path, key.value), at)
            data[key.value] = _build(value, (*path, key.value), out, reader, count)
        return data
    return [_build(item, (*path, i), out, reader, count) for i, item in enumerate(node.value)]
