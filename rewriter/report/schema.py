"""What follows from the spec's models and the methods' code: a JSON Schema for editors, a page for people."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..spec import Spec, link_model
from ..transforms import CLASSES, TRANSFORMS, Transform

SCHEMA, PAGE = Path("specs/spec.schema.json"), Path("docs/methods.md")
WORDS = {
    "matrix": "weights of two or more dimensions",
    "vector": "vectors (biases)",
    "cross_attention": "weights of cross-attention",
    "attention": "a layer's attention, inside its residual",
    "feed_forward": "a layer's feed-forward, inside its residual",
    "keys": "keys of attention",
    "values": "values of attention",
    "embeddings": "the module that reads the token ids",
}


def pages() -> dict[Path, str]:
    """Each generated file and its text."""
    return {SCHEMA: json.dumps(spec_schema(), indent=1) + "\n", PAGE: methods_page()}


def spec_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a spec file: one spec, or variants of one."""
    spec = Spec.model_json_schema()
    definitions, bare, links = spec.pop("$defs"), [], {}
    for name, one in TRANSFORMS.items():
        link = link_model(one).model_json_schema()
        definitions |= link.pop("$defs")
        link["description"] = one.doc
        if not required(one):
            bare.append(name)
            link["properties"][name] = {"anyOf": [link["properties"][name], {"type": "null"}]}
        links[f"{name}_transform"] = link
    definitions |= links
    refs = [{"$ref": f"#/$defs/{name}"} for name in links]
    definitions["Rule"]["properties"]["apply"]["items"] = {"anyOf": [{"enum": bare}, {"oneOf": refs}]}
    anything = {name: {"description": f"as of one spec: {name}"} for name in spec["properties"]}
    variant = {"type": "object", "properties": {**anything, "values": _VALUES}, "additionalProperties": False}
    variants = {
        "type": "object",
        "description": "Many specs in one file: each variant replaces keys, `$name` stands for what let or values say.",
        "properties": {
            **anything,
            "let": {"type": "object", "description": "name -> what $name stands for in every variant"},
            "variants": {"type": "array", "minItems": 1, "items": variant},
        },
        "required": ["version", "variants"],
        "additionalProperties": False,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Subspan spec",
        "anyOf": [{"$ref": "#/$defs/Spec"}, {"$ref": "#/$defs/Variants"}],
        "$defs": {**definitions, "Spec": spec, "Variants": variants},
    }


_VALUES = {
    "type": "object",
    "description": "name -> list; one spec for every place in the lists",
    "additionalProperties": {"type": "array"},
}


def required(method: Transform) -> list[str]:
    """Names of the options that have no default."""
    return [name for name, field in method.options.model_fields.items() if field.is_required()]


def methods_page() -> str:
    """Every method with its expression and options, in Markdown."""
    parts = [
        "# Methods",
        "Generated from the methods' own code by `python pipelines/schema.py`; a test keeps it so. y = xW with W of "
        "shape (n, m), W = U S Vt; equations are of [arXiv 2407.05417v2](https://arxiv.org/abs/2407.05417v2).",
    ]
    for kind in CLASSES:
        parts.append(f"## {kind.capitalize()}")
        for name, method in TRANSFORMS.items():
            if method.kind == kind:
                parts += _section(name, method)
    return "\n\n".join(parts) + "\n"


def _section(name: str, method: Transform) -> list[str]:
    given = ", ".join(f"{option}: ..." for option in required(method))
    example = f"{{{name}: {{{given}}}}}" if given else name
    stands = "; ".join(WORDS[kind] for kind in method.on)
    out = [f"### {name}", method.doc, f"Stands on {stands}. In a spec: `{example}`."]
    rows = [_row(option, field, method.options) for option, field in method.options.model_fields.items()]
    return [*out, "\n".join(["| option | values | default | |", "| --- | --- | --- | --- |", *rows])] if rows else out


def _row(option: str, field: FieldInfo, options: type[BaseModel]) -> str:
    schema = options.model_json_schema()["properties"][option]
    values = " or ".join(filter(None, map(_values, schema.get("anyOf", [schema]))))
    default = "required" if field.is_required() else "" if field.default is None else f"`{field.default}`"
    return f"| `{option}` | {values} | {default} | {field.description} |"


def _values(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "null":
        return ""
    names = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in names.items() if key in schema and schema[key] < 2**24]
    return " ".join([schema["type"], ", ".join(bounds)]).strip()
