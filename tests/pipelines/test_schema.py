"""The generated schema and page: fresh, complete, and of one mind with the models that check specs."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from pipelines.validate import files
from rewriter import TRANSFORMS, SubspanError, load_specs
from rewriter.report.schema import SCHEMA, pages

ROOT = Path(__file__).parents[2]
SPECS = files([ROOT / "specs"])


def read(file):
    return YAML(typ="safe", pure=True).load(file.read_text())


@pytest.fixture(scope="module")
def validator():
    schema = json.loads((ROOT / SCHEMA).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_what_is_generated_is_fresh():
    for file, text in pages().items():
        assert (ROOT / file).read_text() == text, f"{file} is stale: python pipelines/schema.py"


def test_every_method_is_on_the_page():
    page = (ROOT / "docs" / "methods.md").read_text()
    for name, method in TRANSFORMS.items():
        assert f"### {name}\n\n{method.doc}" in page
        for option, field in method.options.model_fields.items():
            assert f"| `{option}` |" in page and field.description in page


def test_every_field_has_a_description():
    schema = json.loads((ROOT / SCHEMA).read_text())
    for name, definition in schema["$defs"].items():
        if name.endswith("_transform") or name == "Variants":
            continue
        for key, field in definition.get("properties", {}).items():
            linked = schema["$defs"].get(field.get("$ref", "")[8:], {})
            described = field.get("description") or linked.get("description")
            assert described, (name, key)


@pytest.mark.parametrize("file", SPECS, ids=lambda file: file.stem)
def test_specs_are_valid_and_say_where_the_schema_is(validator, file):
    validator.validate(read(file))
    line = file.read_text().splitlines()[0]
    assert line.startswith("# yaml-language-server: $schema=")
    assert (file.parent / line.partition("$schema=")[2]).resolve() == ROOT / SCHEMA


CHANGES = [
    ("rules", [{"target": "w", "apply": ["lora"]}]),
    ("rules", [{"target": "w", "apply": [{"lora": {"rank": 0}}]}]),
    ("rules", [{"target": "w", "apply": [{"lora": {"rank": 8, "alhpa": 1}}]}]),
    ("rules", [{"target": "w", "apply": [{"lorra": {"rank": 8}}]}]),
    ("rules", [{"target": "w", "apply": []}]),
    ("rules", [{"apply": ["ssb"]}]),
    ("rules", []),
    ("train", {"epochs": 0}),
    ("train", {"epoch": 1}),
    ("model", {"name": "x", "task": "poetry"}),
    ("version", 2),
    ("unknown", 1),
    ("strict", True),
    ("rules", [{"target": ["a", "b"], "apply": ["ssb", {"ssl": None}, {"dora": {"rank": 2, "alpha": 4}}]}]),
    ("limits", {"trainable_parameters": "0.5%", "activation_memory": "8 GiB", "overhead_flops": "5%"}),
]


@pytest.mark.parametrize(("key", "value"), CHANGES, ids=range(len(CHANGES)))
def test_the_schema_and_the_models_agree(validator, tmp_path, key, value):
    data = copy.deepcopy(read(ROOT / "specs" / "quickstart.yaml")) | {key: value}
    (tmp_path / "spec.yaml").write_text(json.dumps(data))
    try:
        load_specs(tmp_path / "spec.yaml")
        right = True
    except SubspanError:
        right = False
    assert validator.is_valid(data) == right
