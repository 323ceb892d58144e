"""Validation: every kind of mistake with its place and words, levels, formats, statuses, and what a fuzzer thinks up."""

import contextlib
import io
import json
import os
import socket
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from sarif_pydantic import Sarif

from pipelines.validate import Format, Level, check_all
from rewriter import TRANSFORMS
from rewriter.graph.traced import TracedModel
from tests import tiny
from tests.pipelines.test_run import call

# (text, what stands in its place, line:column+width, message); MODEL and DATA are paths.
GOLDEN = [
    ('version: 1', 'version: [1', '2:6+1', "broken YAML: expected ',' or ']', but got ':'"),
    ('version: 1', 'version: 2', '1:10+1', 'version: should be 1, not 2'),
    ('version: 1\n', '', '1:1+1', "'version' is missing"),
    ('version: 1', 'version: 1\nversion: 1', '2:1+7', "duplicate key 'version'"),
    ('version: 1', 'vresion: 1', '1:1+7', "vresion: unknown key 'vresion'; did you mean 'version'? (known: version, meta, model, data, rules, train, export, limits, strict)"),
    ('version: 1', 'version: !!python/name:os.system', '1:10+23', "tag 'tag:yaml.org,2002:python/name:os.system' is not allowed: only plain YAML values are read"),
    ('version: 1', 'version: 1\n<<: {a: 1}', '2:1+2', 'merge keys (<<) are not read: write the keys out'),
    ('version: 1', '- version', '2:1+1', "broken YAML: expected <block end>, but found '?'"),
    ('version: 1', 'version: 1\n? [a]\n: b', '2:3+3', 'a key must be plain text'),
    ('name: MODEL', 'nmae: x', '3:3+4', "model.nmae: unknown key 'nmae'; did you mean 'name'? (known: name, gguf, task, task_options, labels, dtype, quantise, revision, config, trust_remote_code)"),
    ('task: sequence-classification', 'task: sequence-clasification', '4:9+22', "model.task: should be 'sequence-classification', 'multi-label-classification', 'regression', 'token-classification', 'image-classification', 'sentence-embedding', 'question-answering', 'causal-lm', 'preference' or 'seq2seq-lm', not 'sequence-clasification'"),
    ('labels: [negative, positive]', 'labels: [positive, positive]', '5:11+20', 'model.labels: labels must differ from each other'),
    ('task: sequence-classification', 'task: regression', '5:3+6', 'model.labels: regression has no labels'),
    ('labels: [negative, positive]', 'labels: []', '5:11+2', 'model.labels: list should have at least 1 item, not 0'),
    ('labels: [negative, positive]', 'labels: [negative]', '10:32+5', "data.columns.label: column 'label' holds '1' (text 'fine plot plot plot a'); expected one of the labels negative; model.labels names them"),
    ('labels: [negative, positive]', 'dtype: int8', '5:10+4', "model.dtype: should be 'float32', 'bfloat16' or 'float16', not 'int8'"),
    ('labels: [negative, positive]', 'trust_remote_code: "yes"', '5:22+5', "model.trust_remote_code: should be a valid boolean, not 'yes'"),
    ('format: csv', 'format: pickle', '7:11+6', "data.format: should be 'csv', 'json', 'parquet', 'arrow', 'text' or 'imagefolder', not 'pickle'"),
    ('format: csv\n  files', 'files', '7:3+1', 'data: `files` needs a `format`, e.g. csv'),
    ('files: DATA', 'files: /nowhere.csv', '8:10+12', 'data.files: no such file: /nowhere.csv'),
    ('files: DATA', 'files: package://no_such_package/data.csv', '8:10+34', "data.files: package 'no_such_package' is not installed: pip install no-such-package"),
    ('files: DATA', 'name: some/set\n  files: DATA', '7:3+1', 'data: give either `format` and `files`, or `name` of a hub data set'),
    ('validation: 16', 'validation: 1600', '9:23+4', "data.split.validation: can't hold out 1600 of 64 rows"),
    ('validation: 16', 'validation: 1.5', '9:23+3', 'data.split.validation: should be a valid integer, not 1.5, or should be less than 1, not 1.5'),
    ('text: text', 'text: body', '10:19+4', "data.columns.text: no column 'body'; the data has text, label"),
    ('text: text, ', '', '10:12+14', "data.columns: 'text' is missing: sequence-classification needs the columns text, label"),
    ('label: label}', 'label: label, labels: label}', '10:39+6', "data.columns.labels: unknown key 'labels'; did you mean 'label'?; sequence-classification reads text, label, text_pair"),
    ('max_length: 16', 'max_length: 65', '11:15+2', 'data.max_length: the model takes at most 64 tokens'),
    ('max_length: 16', 'max_lenght: 16', '11:3+10', "data.max_lenght: unknown key 'max_lenght'; did you mean 'max_length'? (known: format, options, files, name, config, where, columns, turns, chat, values, mixture, split, limit, max_length, long, template, loss)"),
    ('target: "bert.encoder.layer.*.attention.self.{query,value}.weight"', 'target: "bert.encoder.layer.*.attention.self.{query,value.weight"', '13:13+57', "rules[0].target: 'bert.encoder.layer.*.attention.self.{query,value.weight': a brace is not closed"),
    ('self.{query,value}.weight', 'self.querry.weight', '13:13+51', "rules[0].target: 'bert.encoder.layer.*.attention.self.querry.weight' matches no parameter; nearest: bert.encoder.layer.0.attention.self.query.weight, bert.encoder.layer.1.attention.self.query.weight, bert.encoder.layer.0.attention.self.key.weight"),
    ('self.{query,value}.weight', 'self.query', '13:13+43', "rules[0].target: 'bert.encoder.layer.*.attention.self.query' matches no parameter; nearest: bert.encoder.layer.0.attention.self.query.bias, bert.encoder.layer.0.attention.self.query.weight, bert.encoder.layer.1.attention.self.query.bias"),
    ('{lora: {rank: 4', '{lorra: {rank: 4', '14:14+5', "rules[0].apply[0].lorra: unknown method 'lorra'; did you mean 'lora'?"),
    ('{lora: {rank: 4', '{lora: {rnak: 4', '14:21+4', "rules[0].apply[0].lora.rnak: unknown key 'rnak'; did you mean 'rank'? (known: rank, alpha, scale, dropout, ratio, mpc, coefficient)"),
    ('rank: 4', 'rank: 0', '14:27+1', 'rules[0].apply[0].lora.rank: should be greater than or equal to 1, not 0'),
    ('rank: 4', 'rank: 17', '14:27+2', 'rules[0].apply[0].lora.rank: rank 17 is larger than bert.encoder.layer.0.attention.self.query.weight allows: it is 16 x 16'),
    ('rank: 4', 'rank: four', '14:27+4', "rules[0].apply[0].lora.rank: should be a valid integer, not 'four'"),
    ('rank: 4', 'rank: "4"', '14:27+3', "rules[0].apply[0].lora.rank: should be a valid integer, not '4'; write it without quotes"),
    ('alpha: 8', 'alpha: -1', '14:37+2', 'rules[0].apply[0].lora.alpha: should be greater than 0, not -1'),
    ('dropout: 0.1', 'dropout: 1.0', '14:49+3', 'rules[0].apply[0].lora.dropout: should be less than 1, not 1.0'),
    ('dropout: 0.1', 'mpc: x', '14:45+1', "rules[0].apply[0].lora.mpc: should be 'o', 'd' or 'n', not 'x'"),
    ('apply: [{lora: {rank: 4, alpha: 8, dropout: 0.1}}]', 'apply: []', '14:12+2', 'rules[0].apply: list should have at least 1 item, not 0'),
    ('apply: [{lora: {rank: 4, alpha: 8, dropout: 0.1}}]', 'apply: [lora]', '14:13+4', "rules[0].apply[0]: 'rank' is missing"),
    ('apply: [{lora: {rank: 4, alpha: 8, dropout: 0.1}}]', 'apply: [ssb, sam_parser]', '14:12+17', 'rules[0].apply: sam_parser decomposes the frozen weight, so it must be the first of its chain'),
    ('apply: [{lora: {rank: 4, alpha: 8, dropout: 0.1}}]', 'apply: [bitfit]', '14:13+6', 'rules[0].apply[0].bitfit: bitfit tunes vectors (biases), but the target matches the matrix bert.encoder.layer.0.attention.self.query.weight'),
    ('apply: [{lora: {rank: 4, alpha: 8, dropout: 0.1}}]', 'apply: [{prefix: {length: 4}}]', '13:13+58', "rules[0].target: 'bert.encoder.layer.*.attention.self.{query,value}.weight' matches no module; nearest: bert.encoder.layer.0.attention.self.query, bert.encoder.layer.1.attention.self.query, bert.encoder.layer.0.attention.self.key"),
    ('apply: [{lora: {rank: 4, alpha: 8, dropout: 0.1}}]', 'apply: [ssb, {prefix: {length: 4}}]', '14:12+28', 'rules[0].apply: these methods have no kind of place in common: ssb (matrix), prefix (keys, values)'),
    ('apply: [{lora: {rank: 4, alpha: 8, dropout: 0.1}}]', 'apply: [ssb]\n    slice: {out: [0, 99]}', '15:12+14', 'rules[0].slice: bert.encoder.layer.0.attention.self.query.weight has 16 outputs, so [0, 99] is out of range'),
    ('apply: [{lora: {rank: 4, alpha: 8, dropout: 0.1}}]', 'apply: [ssb]\n    slice: {out: [4, 0]}', '15:18+6', 'rules[0].slice.out: expected [start, stop] with 0 <= start < stop'),
    ('apply: [{lora: {rank: 4, alpha: 8, dropout: 0.1}}]', 'apply: [{pa: {rank: 2}}]\n    slice: {out: [0, 8]}', '13:13+58', 'rules[0].target: pa(rank=2) has no matrix to form, but bert.encoder.layer.0.attention.self.query.weight is read by a slice; it works on linear layers'),
    ('"classifier.*"', '"bert.encoder.layer.0.attention.self.query.weight"', '15:13+50', 'rules[1].target: bert.encoder.layer.0.attention.self.query.weight is already transformed by rules[0]; a chain in `apply` composes'),
    ('apply: [full]', 'apply: [ssb]', '16:13+3', 'rules[1].apply[0].ssb: ssb needs a matrix, but the target matches the vector classifier.bias; use full or bitfit'),
    ('apply: [full]', 'apply: [xattn]', '16:13+5', 'rules[1].apply[0].xattn: xattn is for weights of cross-attention, but the target matches classifier.weight'),
    ('epochs: 2', 'epochs: 0', '17:17+1', 'train.epochs: should be greater than 0, not 0'),
    ('epochs: 2', 'epochs: .nan', '17:17+4', 'train.epochs: should be a finite number, not nan'),
    ('batch_size: 8', 'batch_size: 8.5', '17:32+3', 'train.batch_size: should be a valid integer, not 8.5'),
    ('batch_size: 8', 'batch_size: true', '17:32+4', 'train.batch_size: should be a valid integer, not True'),
    ('learning_rate: 1.0e-2', 'learning_rate: 1.0e-2, metric: meteor', '17:66+6', "train.metric: should be 'accuracy', 'f1', 'matthews_correlation', 'loss', 'micro_f1', 'macro_f1', 'mse', 'pearson', 'spearman', 'recall@1', 'recall@5', 'recall@10', 'exact_match', 'perplexity', 'rouge', 'bleu' or 'margin', not 'meteor'"),
    ('learning_rate: 1.0e-2', 'learning_rate: 1.0e-2, metric: mse', '17:66+3', "train.metric: metric 'mse' does not fit sequence-classification: use one of accuracy, f1, matthews_correlation, loss"),
    ('train: {', 'limits: {trainable_parameters: 10}\ntrain: {', '17:32+2', 'limits.trainable_parameters: the plan has 512 parameters, more than the limit of 10 parameters'),
    ('train: {', 'limits: {trainable_parameters: lots}\ntrain: {', '17:32+4', 'limits.trainable_parameters: expected a count, or a share of all parameters such as 0.5%'),
    ('train: {', 'limits: {head_parameters: 0.001%}\ntrain: {', '17:27+6', 'limits.head_parameters: the plan has 34 parameters, more than the limit of 0 parameters'),
    ('train: {', 'limits: {activation_memory: 1 kB}\ntrain: {', '17:29+4', 'limits.activation_memory: the plan has 19,660 bytes, more than the limit of 1,000 bytes, even with all 2 layers computed again'),
    ('train: {', 'limits: {overhead_flops: 0.01%}\ntrain: {', '17:26+5', 'limits.overhead_flops: the plan has 15.24%, more than the limit of 0.01%'),
    ('train: {', 'export: {onnx: {opset: 7}}\ntrain: {', '17:24+1', 'export.onnx.opset: should be greater than or equal to 18, not 7'),
]  # fmt: skip


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return tiny.project(tmp_path_factory.mktemp("project"))


def check(*paths, level="plan", format="json"):
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        results = check_all(list(paths), [], Level(level), Format(format))
    return [finding for result in results for finding in result["findings"]], err.getvalue()


def test_thirty_kinds_at_least():
    assert len(GOLDEN) >= 30


@pytest.mark.parametrize(("old", "new", "place", "message"), GOLDEN, ids=[str(i) for i in range(len(GOLDEN))])
def test_every_mistake_has_its_place_and_words(spec, tmp_path, old, new, place, message):
    paths = {"MODEL": str(spec.parent / "model"), "DATA": str(spec.parent / "data.csv")}
    for name, path in paths.items():
        old, new = old.replace(name, path), new.replace(name, path)
    text, wrong = spec.read_text(), tmp_path / "wrong.yaml"
    assert old in text
    wrong.write_text(text.replace(old, new, 1))
    ((finding,), lines) = check(wrong)
    assert (f"{finding.line}:{finding.column}+{finding.width}", finding.message) == (place, message)
    assert finding.file == str(wrong) and f"error: {finding}\n" in lines
    assert finding.kind == ("unchecked" if "not installed" in message else "spec")


def test_all_mistakes_of_a_file_at_once(spec, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(spec.read_text().replace("rank: 4", "rank: 0").replace("epochs: 2", "epochs: 0"))
    assert [finding.line for finding in check(wrong)[0]] == [14, 17]
    wrong.write_text(spec.read_text().replace("rank: 4", "rank: 99").replace("classifier", "clasifier"))
    assert [finding.line for finding in check(wrong)[0]] == [14, 15]


def test_text_shows_the_line_and_a_caret(spec, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(spec.read_text().replace("rank: 4", "rank: 400"))
    result = call("validate", wrong)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[1:] == [
        "    14 |     apply: [{lora: {rank: 400, alpha: 8, dropout: 0.1}}]",
        "       |                           ^^^",
    ]


def test_statuses(spec, tmp_path):
    right, wrong, offline = spec, tmp_path / "wrong.yaml", tmp_path / "offline.yaml"
    wrong.write_text(spec.read_text().replace("rank: 4", "rank: 400"))
    offline.write_text(spec.read_text().replace(str(spec.parent / "model"), "nobody/nothing"))
    assert call("validate", right).exit_code == 0
    assert call("validate", right, wrong).exit_code == 1
    assert call("validate", offline, right).exit_code == 2
    assert call("validate", offline, wrong).exit_code == 1
    assert call("validate", offline, "--level", "schema").exit_code == 0
    missing = call("validate", tmp_path / "none.yaml")
    assert missing.exit_code == 2 and "No such file" in missing.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    assert call("validate", empty).exit_code == 2


def test_warnings_have_places_too(spec, tmp_path):
    (tmp_path / "w.yaml").write_text(
        spec.read_text().partition('  - target: "classifier.*"')[0] + "train: {epochs: 1}\n"
    )
    found, _ = check(tmp_path / "w.yaml")
    assert {(one.kind, one.line) for one in found} == {("warning", 13)} and "newly made" in found[0].message
    assert call("validate", tmp_path / "w.yaml").exit_code == 0
    github = call("validate", tmp_path / "w.yaml", "--format", "github").stdout.splitlines()
    assert len(github) == 2 and github[0].startswith(f"::warning file={tmp_path / 'w.yaml'},line=13,col=3")


def test_what_there_is_to_say_of_rows_is_said(spec, tmp_path):
    said = call("validate", spec, "--set", "data.max_length=3", "--set", "model.labels=[negative, positive, mixed]")
    assert said.exit_code == 0
    lines = [line for line in said.stdout.splitlines() if line.startswith("note: train")]
    assert "train: 1 of 3 labels stand in no row: mixed" in lines[1] and "rows are cut to 3 tokens" in lines[0]
    report = json.loads(call("validate", spec, "--set", "data.max_length=3", "--format", "json").stdout)
    assert "rows are cut to 3 tokens" in report[0]["notes"][-2] and report[0]["findings"] == []


def test_who_can_serve_the_adapter_is_said(tmp_path):
    spec = tiny.project(tmp_path)
    for name, code in (("{lora: {rank: 2}}", 0), ("ssb", 1)):
        said = call("validate", spec, "--set", f"rules.0.apply=[{name}]", "--for", "peft")
        assert said.exit_code == code
        assert ("is valid, and peft can serve its adapter" in " ".join(said.stdout.split())) == (code == 0)


def test_github_annotations(spec, tmp_path):
    wrong = tmp_path / "a,b:c.yaml"
    wrong.write_text(spec.read_text().replace("rank: 4", "rank: 400"))
    (line,) = call("validate", wrong, "--format", "github").stdout.splitlines()
    assert line.startswith(
        f"::error file={tmp_path}/a%2Cb%3Ac.yaml,line=14,col=27,endColumn=30,title=subspan spec::rules[0]"
    )


def test_sarif_is_read_by_a_published_parser(spec, tmp_path):
    wrong = tmp_path / "wrong one.yaml"
    wrong.write_text(spec.read_text().replace("rank: 4", "rank: 400").replace("classifier", "clasifier"))
    log = Sarif.model_validate_json(call("validate", wrong, spec, "--format", "sarif").stdout)
    (run,) = log.runs
    assert log.version == "2.1.0" and [result.rule_id for result in run.results] == ["spec", "spec"]
    region = run.results[0].locations[0].physical_location.region
    assert (region.start_line, region.start_column, region.end_column) == (14, 27, 30)
    uri = run.results[0].locations[0].physical_location.artifact_location.uri
    assert uri.startswith("file:///") and uri.endswith("/wrong%20one.yaml")
    assert {rule.id for rule in run.tool.driver.rules} == {"spec", "unchecked", "warning"}
    assert not Sarif.model_validate_json(call("validate", spec, "--format", "sarif").stdout).runs[0].results


def test_json_has_the_plan_and_its_costs(spec):
    (entry,) = json.loads(call("validate", spec, "--format", "json", "--level", "trace").stdout)
    assert entry["valid"] and entry["trainable_parameters"] == 4 * 4 * 32 and entry["head_parameters"] == 34
    site = entry["sites"][0]
    assert (site["class"], site["rank"], site["merges"]) == ("extension", 4, True)
    assert site["forward"] == pytest.approx(4 * 32 / 256) and site["backward"] == pytest.approx(2 * 4 * 32 / 256)
    assert [rule["parameters"] for rule in entry["rules"]] == [512, 34]
    assert entry["step"]["activations"] > 0 and entry["step"]["optimiser"] == 3 * 4 * 546


def test_one_trace_for_a_folder_of_one_model(spec, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    other = tiny.project(tmp_path / "other")
    for i in range(25):
        (tmp_path / f"{i:02}_a.yaml").write_text(spec.read_text().replace("rank: 4", f"rank: {1 + i % 16}"))
        (tmp_path / f"{i:02}_b.yaml").write_text(other.read_text().replace("rank: 4", f"rank: {1 + i % 16}"))
    traces, original = [], TracedModel.__init__
    monkeypatch.setattr(TracedModel, "__init__", lambda self, *args: (traces.append(1), original(self, *args))[1])
    found, _ = check(tmp_path)
    assert not found and len(traces) == 2


def test_every_method_passes_every_pass_without_weights(spec, tmp_path):
    bert = "bert.encoder.layer.*"
    linear, vectors = f"{bert}.attention.self.{{query,value}}.weight", f"{bert}.**.bias"
    targets = {"bitfit": vectors, "s_bitfit": vectors, "prompt": "bert.embeddings"}
    targets |= dict.fromkeys(("hadapter", "padapter", "mam", "prefix"), bert)
    options = {"rank": 2, "bottleneck": 3, "length": 4}
    for method in TRANSFORMS:
        given = {name: options[name] for name, f in TRANSFORMS[method].options.model_fields.items() if f.is_required()}
        text = spec.read_text().replace(f'"{linear}"', json.dumps(targets.get(method, linear)))
        step = json.dumps({method: given})
        (tmp_path / f"{method}.yaml").write_text(text.replace("{lora: {rank: 4, alpha: 8, dropout: 0.1}}", step))
    ((finding,), lines) = check(tmp_path, level="trace")
    assert finding.file == str(tmp_path / "xattn.yaml") and "is for weights of cross-attention" in lines


@contextlib.contextmanager
def no_network():
    """Any attempt to reach a network fails the test; a file that appears is a file written."""

    def refuse(*args, **kwargs):
        raise AssertionError("a network call")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield


def answers(folder, content, level, seconds):
    """Status 0, 1 or 2 with a line for each mistake, soon, and nothing written."""
    file = folder / "fuzzed.yaml"
    file.write_bytes(content)
    before, started = sorted(os.listdir(folder)), time.monotonic()
    with no_network():
        found, lines = check(file, level=level)
    assert time.monotonic() - started < seconds
    assert "SUBSPAN_TRACEBACK" not in lines and "Traceback" not in lines, lines
    assert len([line for line in lines.splitlines() if line.startswith("error: ")]) == sum(
        f.kind != "warning" for f in found
    )
    assert sorted(os.listdir(folder)) == before


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=30), st.just([]), st.just({}),
    st.sampled_from([*TRANSFORMS, "**", "{a,b}", "{{{{", "}", "**.**.**.**.weight", "*" * 200, "$rank", "~", "!!binary x", "0x1F"]),
    st.lists(st.integers(-3, 99), max_size=3), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)  # fmt: skip


def places(data, path=()):
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def mutations(draw, data):
    """A valid spec with up to three keys or values replaced, dropped, doubled or renamed."""
    data = json.loads(json.dumps(data))
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([place for place in places(data) if place]))
        place = data
        for key in path:
            place = place[key]
        match draw(st.sampled_from(["replace", "drop", "rename", "wrap"])):
            case "replace":
                place[last] = draw(VALUES)
            case "drop":
                place.pop(last)
            case "rename" if isinstance(place, dict):
                place[draw(st.text(max_size=8))] = place.pop(last)
            case _:
                place[last] = [place[last]]
    return data


@pytest.fixture(scope="module")
def plain(spec):
    """The spec of the tiny project as data, with every section."""
    data = YAML(typ="safe", pure=True).load(spec.read_text())
    data["limits"] = {"trainable_parameters": "90%", "head_parameters": 100}
    data["rules"][0]["slice"] = {"out": [0, 8]}
    return data


SLOWLY = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def test_mutated_specs_always_get_an_answer(plain, tmp_path):
    @settings(max_examples=600, **SLOWLY)
    @given(st.data())
    def at_schema_level(data):
        content = json.dumps(data.draw(mutations(plain))).encode()
        answers(tmp_path, content, "schema", 5)

    @settings(max_examples=80, **SLOWLY)
    @given(st.data())
    def at_plan_level(data):
        answers(tmp_path, json.dumps(data.draw(mutations(plain))).encode(), "plan", 30)

    at_schema_level()
    at_plan_level()


def test_bytes_always_get_an_answer(spec, tmp_path):
    whole = spec.read_bytes()

    @settings(max_examples=300, **SLOWLY)
    @given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))))
    def raw(content):
        answers(tmp_path, content, "schema", 5)

    @settings(max_examples=200, **SLOWLY)
    @given(st.integers(0, len(whole)), st.integers(0, 40), st.binary(max_size=20))
    def spliced(at, cut, more):
        answers(tmp_path, whole[:at] + more + whole[at + cut :], "schema", 5)

    raw()
    spliced()


HOSTILE = {
    "many stars": 'target: "' + "*a" * 400 + '"',
    "many double stars": 'target: "' + ".".join(["**"] * 400) + '.weight"',
    "many braces": 'target: "' + "{a,b}" * 60 + '"',
    "deep braces": 'target: "' + "{" * 4000 + "}" * 4000 + '"',
    "open braces": 'target: "' + "{" * 20000 + '"',
    "a long target": 'target: "' + "x" * 100_000 + '"',
    "a row of braces": 'target: "' + "{a}" * 5000 + '"',
    "brackets": 'target: "' + "[!a-" * 500 + '"',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_globs(spec, tmp_path, name):
    text = spec.read_text().replace('target: "classifier.*"', HOSTILE[name])
    answers(tmp_path, text.encode(), "plan", 20)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "{a: " * 3000,
        "- " * 5000,
        "a: &a [*a]",
        "\n".join(["a0: &a0 [x, x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]),
        "variants: [" + ", ".join(["{values: {row: [" + ",".join("1" * 3000) + "]}}"] * 20) + "]",
        "? " * 3000,
        "a: " + "!" * 5000,
        "a: " + "9" * 5000,
        "\x00\x01",
        "\ufeff" * 3 + "version: 1",
        "%YAML 9.9\n---\na: 1",
        "a: 1\n---\nb: 2",
        "version: 2026-01-01",
    ],
    ids=range(14),
)
def test_hostile_yaml(tmp_path, text):
    answers(tmp_path, text.encode("utf-8", "surrogatepass"), "schema", 60)
