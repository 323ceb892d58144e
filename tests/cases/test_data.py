"""Data that used to enter wrong: each row of the cases, and a second member of its kind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from rewriter import Spec, SpecError, encode, load_rows, task_of
from rewriter.data import check_length
from tests.cases.tiny import pictures
from tests.tiny import make_tokenizer, project

COLUMNS = {"text": "text", "label": "label"}


def spec_of(files, columns=COLUMNS, task="sequence-classification", format="json", **data):
    data = {"max_length": 16} | data
    return Spec(
        version=1,
        model={"name": "x", "task": task},
        data={"format": format, "files": files if isinstance(files, dict) else str(files), "columns": columns, **data},
        rules=[{"target": "w", "apply": ["ssb"]}],
    )


def written(folder, rows, name="rows.jsonl"):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def texts(values, **more):
    return [{"text": f"good {i}", "label": value, **more} for i, value in enumerate(values)]


STARS = ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("values", "labels", "said"),
    [
        (range(5), STARS, "the column holds 0, which is no label's name but the place of '1' .*, and 1, which is a label's name"),
        ([2, 0, 10], ["10", "20", "30"], "the column holds 0, .* place of '10' .*, and 10"),
        ([1, 2, 3, 4], STARS, [0, 1, 2, 3]),
        ([0, 1, 2], ["bad", "fair", "good"], [0, 1, 2]),
        ([0.0, 1.0], ["0", "1"], [0, 1]),
        (["1", "5"], STARS, [0, 4]),
        ([0, 7], ["bad", "good"], "column 'label' holds 7 "),
        ([True, False], ["yes", "no"], "holds True .* which of them is true. Call them 'false' and 'true'"),
        ([True, False], ["True", "False"], [0, 1]),
        ([None, "Some"], ["None", "Some"], "column 'label' holds None "),
        (["01", "02"], ["01", "02", "03"], [0, 1]),
        (["01", "02"], ["a", "b", "c"], "column 'label' holds '01'"),
    ],
    ids=["3-mixed", "3-mixed-tens", "3-names", "3-places", "3-floats", "3-strings", "3-outside", "3-booleans", "3-truth", "3-null", "3-zeros", "3-zero-places"],
)  # fmt: skip
def test_labels_are_read_one_way_in_a_column(tmp_path, values, labels, said):
    file = written(tmp_path, texts(values))
    spec = spec_of({"train": str(file), "validation": str(file)})
    if isinstance(said, str):
        with pytest.raises(SpecError, match=said):
            load_rows(spec, labels)
    else:
        rows = load_rows(spec, labels).train
        assert encode(spec, rows, make_tokenizer(), labels)["labels"] == said


def test_3_a_split_hides_no_mix(tmp_path):
    """Names alone in one part and places alone in the other are a mix all the same."""
    names, places = (str(written(tmp_path, texts(some), f"{some[0]}.jsonl")) for some in ([1, 2], [0, 0]))
    for files in ({"train": names, "validation": places}, {"train": [names, places], "validation": names}):
        with pytest.raises(SpecError, match="the column holds 0, which is no label's name"):
            load_rows(spec_of(files), STARS)


def test_3_names_in_one_part_and_places_in_another(tmp_path):
    names, places = (str(written(tmp_path, texts(some), f"{some[0]}.jsonl")) for some in (["a", "b"], [0, 1]))
    with pytest.raises(SpecError, match="the column holds 0, which is no label's name but the place of 'a'"):
        load_rows(spec_of({"train": names, "validation": places}), ["a", "b"])


@pytest.mark.parametrize(
    ("cells", "labels", "said"),
    [
        (["true", "True"], ["true", "false"], "column 'label' holds 'True'"),
        (["01", "02"], ["01", "02", "03"], [0, 1]),
        (["NA", "None"], ["None", "NA"], [1, 0]),
        (["1", ""], ["no", "yes"], "column 'label' holds None"),
        (["1.0", "2.0"], ["1.0", "2.0", "3.0"], [0, 1]),
        (["1", "0"], ["no", "yes"], [1, 0]),
    ],
    ids=["3-truth", "3-zeros", "3-not-missing", "3-missing", "3-floats", "3-places"],
)
def test_labels_of_a_csv_file_are_as_they_are_written(tmp_path, cells, labels, said):
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"00{i},{cell}\n" for i, cell in enumerate(cells)))
    spec = spec_of({"train": str(file), "validation": str(file)}, format="csv")
    if isinstance(said, str):
        with pytest.raises(SpecError, match=said):
            load_rows(spec, labels)
        return
    rows = load_rows(spec, labels).train
    assert encode(spec, rows, make_tokenizer(), labels)["labels"] == said
    assert rows["text"][0] == "000"


def test_a_filter_of_a_csv_file_reads_its_numbers(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,label\nbad,0\ngood,1\ngreat,1\n")
    both = {"train": str(file), "validation": str(file)}
    assert len(load_rows(spec_of(both, format="csv", where={"label": 1}), ["no", "yes"]).train) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text,label,label\ngood,1,0\nbad,0,1\n", "two columns are called 'label'"),
        ("text,label\ngood,very,1\nbad,very,0\n", "rows have more fields than the header has names"),
    ],
    ids=["twice", "ragged"],
)
def test_a_csv_file_that_can_be_read_two_ways(tmp_path, content, said):
    file = tmp_path / "rows.csv"
    file.write_text(content)
    with pytest.raises(SpecError, match=said):
        load_rows(spec_of(file, format="csv", split={"validation": 1}), ["0", "1"])


def test_3_class_names_of_the_column_are_not_renamed(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    file = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(texts([0, 1]), features=features).to_parquet(file)
    spec = spec_of(file, format="parquet", split={"validation": 1})
    with pytest.raises(SpecError, match="own names are pos, neg, the labels are negative, positive: which is which"):
        load_rows(spec, ["negative", "positive"])
    assert load_rows(spec, ["LABEL_0", "LABEL_1"])


@pytest.mark.parametrize(
    ("row", "columns", "task", "said"),
    [
        ({"text": "a", "label": [0]}, COLUMNS, "sequence-classification", "one label a row.*: multi-label-classification"),
        ({"text": "a", "label": {"name": "x"}}, COLUMNS, "sequence-classification", "one label a row"),
        ({"text": [{"role": "user", "content": "a"}]}, {"text": "text"}, "causal-lm", "does not hold text"),
        ({"text": {"body": "a"}}, {"text": "text"}, "causal-lm", "does not hold text"),
        ({"text": 0.5, "label": 0}, COLUMNS, "sequence-classification", "does not hold text"),
        ({"text": True, "label": 0}, COLUMNS, "sequence-classification", "does not hold text"),
        ({"text": None, "label": 0}, COLUMNS, "sequence-classification", r"row 0 of column 'text' holds no text \(null\)"),
        ({"tokens": ["a"], "label": [0, 1]}, {"tokens": "tokens", "label": "label"}, "token-classification", "row 0 has 1 words and 2 labels"),
        ({"tokens": ["a", "b"], "label": [0]}, {"tokens": "tokens", "label": "label"}, "token-classification", "row 0 has 2 words and 1 labels"),
        ({"tokens": ["a", None], "label": [0, 1]}, {"tokens": "tokens", "label": "label"}, "token-classification", "row 0 holds a word that is null"),
        ({"tokens": [1.5], "label": [0]}, {"tokens": "tokens", "label": "label"}, "token-classification", "a list of words"),
    ],
    ids=["4-list", "4-dict", "5-messages", "5-dict", "5-float", "5-bool", "7-null", "12-more", "12-fewer", "12-null-word", "12-numbers"],
)  # fmt: skip
def test_cells_of_another_kind_are_refused(tmp_path, row, columns, task, said):
    with pytest.raises(SpecError, match=said):
        load_rows(spec_of(written(tmp_path, [row] * 4), columns, task, split={"validation": 1}), ["no", "yes"])


@pytest.mark.parametrize("role", ["tokens", "label"], ids=["12-null-row", "12-null-labels"])
def test_12_null_rows_are_refused(tmp_path, role):
    row = {"tokens": ["a"], "label": [0]}
    spec = spec_of(
        written(tmp_path, [row, row | {role: None}, row]),
        {"tokens": "tokens", "label": "label"},
        "token-classification",
        split={"validation": 1},
    )
    with pytest.raises(SpecError, match=f"row 1 holds no list in '{role}'"):
        load_rows(spec, ["O", "N"])


def test_12_a_null_list_of_labels_is_refused(tmp_path):
    rows = [{"text": "a", "label": [0]}, {"text": "b", "label": None}]
    spec = spec_of(written(tmp_path, rows), task="multi-label-classification", split={"validation": 1})
    with pytest.raises(SpecError, match="row 1 holds no list of labels; a row without a label has an empty one"):
        load_rows(spec, ["x", "y"])


def test_6_the_end_is_learnt_where_a_text_is_not_cut():
    rows = datasets.Dataset.from_dict({"text": ["good film", "good " * 20]})
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    end = tokenizer.convert_tokens_to_ids("[SEP]")
    found = encode(spec_of("x", {"text": "text"}, "causal-lm", max_length=8), rows, tokenizer, [])
    assert found["input_ids"][0][-1] == end and found["labels"][0][-2] == end
    assert end not in found["input_ids"][1] and len(found["input_ids"][1]) == 8


@pytest.mark.parametrize(
    ("task", "values", "left"),
    [("causal-lm", ["", "good film", "", "bad"], [2, 2]), ("sequence-classification", ["", "good film"], [2])],
    ids=["7-next-token", "7-label"],
)
def test_7_rows_without_a_token_are_left_out_and_counted(task, values, left):
    tokenizer, columns = make_tokenizer(), {"text": "text"} | ({"label": "label"} if "seq" in task else {})
    tokenizer.backend_tokenizer.post_processor = None
    rows = datasets.Dataset.from_dict({"text": values, "label": [0] * len(values)})
    notes = []
    found = encode(spec_of("x", columns, task), rows, tokenizer, ["a", "b"], notes)
    assert [len(ids) for ids in found["input_ids"]] == ([3, 2] if task == "causal-lm" else left)
    assert notes == [f"{len(values) - len(left)} of {len(values)} rows have nothing to learn from and are left out"]
    with pytest.raises(SpecError, match="none of 1 rows has anything to learn from"):
        encode(spec_of("x", columns, task), rows.select([0]), tokenizer, ["a", "b"])


@pytest.mark.parametrize("task", ["causal-lm", "sentence-embedding"], ids=["10-texts", "10-pairs"])
def test_10_what_is_cut_is_said(task):
    columns = {"text": "text"} | ({"text_pair": "text"} if task == "sentence-embedding" else {})
    rows, notes = datasets.Dataset.from_dict({"text": ["good " * 14, "good film"]}), []
    encode(spec_of("x", columns, task, max_length=8), rows, make_tokenizer(), [], notes)
    assert notes == ["1 of 2 rows are cut to 8 tokens: 40.0% of all tokens are not read (data.max_length)"]


def test_13_f1_goes_by_the_number_of_labels():
    from sklearn.metrics import f1_score

    task = task_of("sequence-classification")
    guess, truth = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
    for classes, average in ((2, "binary"), (3, "macro")):
        found = np.stack([guess, truth, np.full_like(guess, classes)], 1).astype(float)
        assert task.measure("f1", found, None) == pytest.approx(f1_score(truth, guess, average=average))


@pytest.mark.parametrize("marked", [-100.0, 0.0], ids=["14-mark", "14-zero"])
def test_14_every_number_is_a_target(marked):
    task, out = task_of("regression"), type("Out", (), {"logits": torch.tensor([[1.0], [2.0]])})()
    targets = {"labels": torch.tensor([marked, 2.5])}
    loss = task.loss(out, targets) / task.count(targets)
    assert float(loss) == pytest.approx(task.measure("mse", task.summary(out, targets).double().numpy(), None))


@pytest.mark.parametrize("name", ["[v2]/rows.jsonl", "a::b #3?/*.jsonl", "[ab].jsonl"], ids=["20-brackets", "20-all", "55-glob"])  # fmt: skip
def test_files_are_those_that_are_named(tmp_path, name):
    written(tmp_path, texts([1, 1]), "a.jsonl")
    file = written(tmp_path, texts([0, 0, 0, 0]), name)
    rows = load_rows(spec_of(file, split={"validation": 1}), ["0", "1"])
    assert set(rows.train["label"]) == {0} and len(rows.train) == 3


def test_55_a_file_of_stars_does_not_stand_for_others(tmp_path):
    written(tmp_path, texts([1, 1]), "a.jsonl")
    with pytest.raises(SpecError, match=r"no such file: .*\*.jsonl"):
        load_rows(spec_of(tmp_path / "*.jsonl", split={"validation": 1}), ["0", "1"])


@pytest.mark.parametrize(
    "option",
    ["cache_dir", "num_proc", "token", "download_mode", "base_path", "streaming", "storage_options", "data_dir", "features"],
)  # fmt: skip
def test_57_options_are_of_the_reader_alone(tmp_path, option):
    file = written(tmp_path, texts([0, 1]))
    with pytest.raises(ValueError, match=f"no option {option!r}|has no {option!r}"):
        try:
            load_rows(spec_of(file, options={option: "x"}, split={"validation": 1}), ["0", "1"])
        except SpecError as error:
            raise ValueError(str(error)) from None
    assert not (Path.cwd() / "x").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("null", "rows of JSON start with"),
        ("null\n{}", "rows of JSON start with"),
        (" \n null", "rows of JSON start with"),
        ("3", "rows of JSON start with"),
        ("", "is empty"),
        ('[{"text": "a"}, 3]', "can't read the data"),
        ("{", "can't read the data"),
        ("[[1]]", "no column 'label'"),
        ('[{"text": "a", "label": 0}, null, {"text": "b", "label": 0}]', r"row 1 of column 'text' holds no text \(null\)"),
    ],
    ids=["67-null", "67-null-first", "67-space", "67-number", "67-empty", "67-mixed", "67-open", "67-lists", "67-null-row"],
)  # fmt: skip
def test_67_json_that_holds_no_rows(tmp_path, text, said):
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(SpecError, match=said):
        load_rows(spec_of(file, split={"validation": 1}), ["0", "1"])


def test_62_pictures_in_a_table_open_no_file(tmp_path):
    """A table's own description may make pictures of a column, with paths that lead anywhere."""
    secret = tmp_path / "secret.png"
    Image.new("RGB", (4, 4)).save(secret)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("int64"), "text": datasets.Image()}
    )
    rows = [
        {"image": {"path": str(secret), "bytes": None}, "label": 0, "text": {"path": str(secret), "bytes": None}}
    ] * 4
    raw = datasets.Features({name: {"path": datasets.Value("string"), "bytes": datasets.Value("binary")} for name in ("image", "text")} | {"label": datasets.Value("int64")})  # fmt: skip
    file = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows, features=raw).cast(features).to_parquet(file)
    secret.unlink()
    with pytest.raises(SpecError, match=r"row 0 of column 'image' holds a path, .*secret.png', and no image"):
        load_rows(spec_of(file, {"image": "image", "label": "label"}, "image-classification", "parquet", split={"validation": 1}), ["0", "1"])  # fmt: skip
    with pytest.raises(SpecError, match="does not hold text"):
        load_rows(spec_of(file, format="parquet", split={"validation": 1}), ["0", "1"])


@pytest.mark.parametrize("name", ["pictures", "[v2] #3"], ids=["62-readme", "20-pictures"])
def test_a_folder_of_pictures_is_that_folder(tmp_path, name):
    folder = pictures(tmp_path / name)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: http://127.0.0.1:9/x.png\n---\n"
    )
    spec = spec_of(folder, {"image": "image", "label": "label"}, "image-classification", "imagefolder", split={"validation": 1})  # fmt: skip
    rows = load_rows(spec, ["cat", "dog"])
    assert len(rows.train) == 3 and rows.train.features["label"].names == ["cat", "dog"]


def test_62_a_link_out_of_a_folder_of_pictures_is_not_followed(tmp_path):
    folder = pictures(tmp_path / "in")
    Image.new("RGB", (8, 8)).save(tmp_path / "out.png")
    (folder / "cat" / "9.png").symlink_to(tmp_path / "out.png")
    spec = spec_of(folder, {"image": "image", "label": "label"}, "image-classification", "imagefolder", split={"validation": 1})  # fmt: skip
    assert len(load_rows(spec, ["cat", "dog"]).train) == 3


NO_CONNECTION = """
import os, socket, sys
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)
def refused(*a, **k):
    print("CONNECTS", a[1:], file=sys.stderr)
    raise OSError("no network")
socket.socket.connect = refused
socket.getaddrinfo = refused
from pathlib import Path
import typer
sys.argv = ["validate", sys.argv[1]]
from pipelines.validate import validate
typer.run(validate)
"""


def test_60_local_names_make_no_connection_and_validate_writes_nothing(tmp_path):
    (tmp_path / "p").mkdir()
    spec = project(tmp_path / "p")
    home = tmp_path / "home"
    home.mkdir()
    before = sorted(str(file) for file in (tmp_path / "p").rglob("*"))
    env = {**os.environ, "HOME": str(home), "PYTHONPATH": str(Path.cwd())}
    env = {name: value for name, value in env.items() if not name.startswith(("HF_", "XDG_"))}
    done = subprocess.run([sys.executable, "-c", NO_CONNECTION, str(spec)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CONNECTS" not in done.stderr
    assert sorted(str(file) for file in (tmp_path / "p").rglob("*")) == before
    assert [str(file) for file in home.rglob("*") if file.is_file()] == []


def test_a_length_is_bounded():
    spec = spec_of("x", max_length=65)
    with pytest.raises(SpecError, match="at most 64 tokens"):
        check_length(spec, 64)


@pytest.mark.parametrize("value", [1e300, "1_0", "nan"])
def test_a_number_that_nothing_can_be_learnt_from(tmp_path, value):
    file = written(tmp_path, texts([value, value]))
    with pytest.raises(SpecError, match="expected a finite number, of 1e18 at most"):
        load_rows(spec_of(file, task="regression", split={"validation": 1}), [])


def test_a_folder_by_the_name_of_a_data_set(tmp_path):
    """Its README may say to read what lies elsewhere."""
    spec = spec_of(tmp_path)
    data = spec.data.model_copy(update={"files": None, "format": None, "name": str(tmp_path)})
    with pytest.raises(SpecError, match=r"is on this disk: name its files in data\.files"):
        load_rows(spec.model_copy(update={"data": data}), ["no", "yes"])
