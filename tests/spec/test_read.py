"""The spec and its YAML: places of mistakes, safe_load semantics, overrides, and the way back."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter import TRANSFORMS, Rule, Spec, SpecError, SubspanError, dump_spec, load_spec
from rewriter.spec.places import YamlError, parse

SPEC = """\
version: 1
model: {name: some/model, task: sequence-classification, labels: [no, yes]}
data:
  format: csv
  files: data.csv
  columns: {text: t, label: l}
rules:
  - target: "a.*.weight"
    apply: [ssb, {lora: {rank: 8}}]
    slice: {in: [0, 4]}
"""


def load(tmp_path, text, *overrides):
    file = tmp_path / "spec.yaml"
    file.write_text(text)
    return load_spec(file, list(overrides))


def test_defaults_and_shorthand(tmp_path):
    spec = load(tmp_path, SPEC)
    (rule,) = spec.rules
    assert [(m.name, o.model_dump()) for m, o in rule.chain][1] == (
        "lora",
        {"rank": 8, "alpha": None, "scale": "fixed", "dropout": 0.0, "ratio": 1.0, "mpc": None, "coefficient": 1e-3},
    )
    assert rule.slice.axis == "in" and rule.slice.bounds == (0, 4)
    assert spec.metric == "accuracy" and spec.train.batch_size == 32 and spec.export.onnx.opset == 18
    assert spec.model.labels == ["no", "yes"]  # YAML 1.2: they are not booleans.


def test_there_and_back(tmp_path):
    spec = load(tmp_path, SPEC, "train.epochs=2.5", "rules.0.apply.1.lora.rank=4", "export.onnx=null")
    again = load(tmp_path, dump_spec(spec))
    assert dump_spec(again) == dump_spec(spec)
    assert again.train.epochs == 2.5 and again.export.onnx is None
    assert again.rules[0].chain[1][1].rank == 4


def test_built_in_python():
    spec = Spec(
        version=1,
        model={"name": "x", "task": "causal-lm"},
        rules=[Rule(target="w", apply=["ssb", {"lora": {"rank": 2}}])],
    )
    assert [method.name for method, _ in spec.rules[0].chain] == ["ssb", "lora"]
    with pytest.raises(SpecError, match="does not fit"):
        Spec(version=1, model={"name": "x", "task": "causal-lm"}, rules=spec.rules, train={"metric": "f1"})


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        ("version: 1\n", "", "1:1", "'version' is missing"),
        ("version: 1", "version: 2", "1:10", "1"),
        ("task: sequence", "tsak: sequence", "2:27", "did you mean 'task'"),
        ("[no, yes]", "[no, no]", "2:66", "labels must differ"),
        ("ssb, ", "ssbb, ", "9:13", "unknown method 'ssbb'; did you mean 'ssb'"),
        ("{rank: 8}", "{rank: 0}", "9:32", "greater than or equal to 1"),
        ("{rank: 8}", "{rnak: 8}", "9:26", "did you mean 'rank'"),
        ("{rank: 8}", '{rank: "8"}', "9:32", "write it without quotes"),
        ("{lora: {rank: 8}}", "lora", "9:18", "'rank' is missing"),
        ("{lora: {rank: 8}}", "3", "9:18", "expected a method"),
        ("[ssb, {lora: {rank: 8}}]", "[]", "9:12", "at least 1"),
        ("{in: [0, 4]}", "{in: [4, 0]}", "10:17", "expected [start, stop]"),
        ("{in: [0, 4]}", "{in: [0, 4], out: [0, 4]}", "10:12", "either `out` or `in`"),
        ("  format: csv\n", "", "4:3", "`files` needs a `format`"),
        ("{text: t, label: l}", "{text: t}", "6:12", "'label' is missing"),
        ("{text: t, label: l}", "{txt: t, label: l}", "6:13", "did you mean 'text'"),
        ("version: 1", "version: 1\n\tx: 2", "2:1", "broken YAML"),
        ("version: 1", "version: .nan", "1:10", "1"),
        ("version: 1", "<<: {a: 1}\nversion: 1", "1:1", "merge keys"),
    ],
)
def test_places(tmp_path, old, new, place, message):
    assert old in SPEC
    with pytest.raises(SubspanError) as caught:
        load(tmp_path, SPEC.replace(old, new, 1))
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'spec.yaml'}:{place}: ") and message in line, line
    assert "\n" not in line


@pytest.mark.parametrize("text", ["", "- 1", "text", "\x00", "---\na: 1\n---\nb: 2\n", "a: &a [*a]", "{" * 2000])
def test_what_is_no_spec(tmp_path, text):
    with pytest.raises(SubspanError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path))


def test_no_such_file_and_no_text(tmp_path):
    with pytest.raises(SubspanError, match="No such file"):
        load_spec(tmp_path / "nowhere.yaml")
    (tmp_path / "spec.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SubspanError, match="not UTF-8"):
        load_spec(tmp_path / "spec.yaml")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_answer(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    with pytest.raises(SubspanError):
        load_spec(file)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text("abc xyz", max_size=5) | st.floats(-1e9, 1e9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abcdef", min_size=1, max_size=4), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=4), values, min_size=1, max_size=4), st.booleans())
def test_data_is_what_safe_load_reads(data, flow):
    text = yaml.safe_dump(data, default_flow_style=flow)
    assert parse(text).data == data


def test_duplicate_keys_and_tags():
    with pytest.raises(YamlError, match="duplicate key 'a'") as caught:
        parse("a: 1\nb: 2\n a: 3".replace("\n ", "\n"))
    assert (caught.value.line, caught.value.column) == (3, 1)
    with pytest.raises(YamlError, match="not allowed"):
        parse("a: !!python/name:os.system")
    with pytest.raises(YamlError, match="not allowed"):
        parse("a: !!binary aGk=")


def test_every_method_has_words_for_its_options():
    for method in TRANSFORMS.values():
        assert method.doc and method.kind in ("reconstruction", "extension", "combination")
        assert all(field.description for field in method.options.model_fields.values())
