"""Rows: filters, splits, limits, labels, and what a batch looks like."""

import json

import datasets
import pytest
import torch

from rewriter import Spec, SpecError, encode, load_rows, task_of
from rewriter.data import short_enough
from rewriter.spec.data import Split
from rewriter.tasks import Question
from rewriter.tasks.base import IGNORED, class_reader
from tests.tiny import make_tokenizer


def spec_of(files, columns, task="sequence-classification", format="csv", **data):
    return Spec(
        version=1,
        model={"name": "x", "task": task},
        data={"format": format, "files": str(files), "columns": columns, "max_length": 12, **data},
        rules=[{"target": "w", "apply": ["ssb"]}],
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.csv"
    rows = [f"t{i},{i % 2},{'ab'[i // 30]},{i / 2}" for i in range(60)]
    file.write_text("\n".join(["text,label,source,score", *rows, "last,1,a,0"]) + "\n")
    return file


COLUMNS = {"text": "text", "label": "label"}
NAMES = ["input_ids", "attention_mask"]


def test_where_split_limit(table):
    spec = spec_of(table, COLUMNS, where={"source": "a"}, split={"validation": 10, "seed": 1}, limit={"train": 12})
    rows = load_rows(spec, ["no", "yes"])
    assert (len(rows.train), len(rows.validation)) == (12, 10)
    texts = [set(part["text"]) for part in (rows.train, rows.validation)]
    assert not texts[0] & texts[1]
    again = load_rows(spec, ["no", "yes"])
    assert again.train["text"] == rows.train["text"]
    share = load_rows(spec_of(table, COLUMNS, where={"source": ["a", "b"]}, split={"validation": 0.5}), ["no", "yes"])
    assert len(share.validation) == pytest.approx(30, abs=1)


@pytest.mark.parametrize(
    ("data", "labels", "message", "path"),
    [
        (
            {"split": {"validation": 5}, "where": {"sauce": "a"}},
            ["0", "1"],
            "no column 'sauce'",
            ("data", "where", "sauce"),
        ),
        (
            {"split": {"validation": 5}, "where": {"source": "c"}},
            ["0", "1"],
            "source holds a, b",
            ("data", "where", "source"),
        ),
        ({"split": {"validation": 61}}, ["0", "1"], "can't hold out 61 of 61", ("data", "split", "validation")),
        ({"split": {"validation": 5}}, ["yes"], "expected one of the labels yes", ("data", "columns", "label")),
        ({}, ["0", "1"], "no validation data", ("data",)),
    ],
)
def test_refused(table, data, labels, message, path):
    with pytest.raises(SpecError, match=message) as caught:
        load_rows(spec_of(table, COLUMNS, **data), labels)
    assert caught.value.path == path


@pytest.mark.parametrize(
    ("value", "labels", "index"),
    [(0, ["no", "yes"], 0), (1.0, ["no", "yes"], 1), ("yes", ["no", "yes"], 1), (5, ["1", "5"], 1), ("1", ["no", "yes"], 1), ("01", ["no", "yes"], None), (True, ["no", "yes"], None),
     (2, ["no", "yes"], None), (-1, ["no", "yes"], None), (None, ["no", "yes"], None), (float("nan"), ["no", "yes"], None)],
)  # fmt: skip
def test_labels(value, labels, index):
    rows = datasets.Dataset.from_dict({"text": ["a"], "label": [value]})
    read = class_reader(rows.features["label"], labels)
    if index is None:
        with pytest.raises(ValueError):
            read(value)
    else:
        assert read(value) == index


def test_class_labels_go_by_name():
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["yes", "no"])})
    rows = datasets.Dataset.from_dict({"text": ["a"], "label": [0]}, features=features)
    assert class_reader(rows.features["label"], ["no", "yes"])(0) == 1


def test_regression_wants_numbers(table):
    rows = load_rows(spec_of(table, {"text": "text", "label": "score"}, "regression", split={"validation": 5}), [])
    assert len(rows.train) == 56
    with pytest.raises(SpecError, match="expected a finite number"):
        load_rows(spec_of(table, {"text": "text", "label": "source"}, "regression", split={"validation": 5}), [])


@pytest.mark.parametrize(
    ("task", "columns", "said", "role"),
    [
        ("sequence-classification", {"text": "t", "label": "some"}, "does not hold one label a row, as sequence-classification reads; a task that reads it: multi-label-classification$", "label"),
        ("multi-label-classification", {"text": "t", "label": "y"}, "does not hold a list of labels a row.*: sequence-classification", "label"),
        ("sequence-classification", {"text": "some", "label": "y"}, "does not hold text, as sequence-classification reads$", "text"),
        ("causal-lm", {"text": "turns"}, "does not hold text", "text"),
        ("token-classification", {"tokens": "t", "label": "some"}, "does not hold a list of words", "tokens"),
        ("image-classification", {"image": "t", "label": "y"}, "does not hold images", "image"),
        ("question-answering", {"question": "t", "context": "t", "answers": "some"}, "as SQuAD writes them", "answers"),
        ("question-answering", {"question": "t", "context": "t", "answers": "half"}, "has no answer_start", "answers"),
        ("regression", {"text": "t", "label": "t"}, "expected a finite number", "label"),
        ("token-classification", {"tokens": "some", "label": "two"}, "row 0 has 1 words and 2 labels", "label"),
    ],
)  # fmt: skip
def test_columns_of_another_kind_are_refused(tmp_path, task, columns, said, role):
    file = tmp_path / "rows.jsonl"
    row = {
        "t": "good",
        "y": "no",
        "some": ["no"],
        "two": ["no", "no"],
        "turns": [{"role": "a"}],
        "half": {"text": ["x"]},
    }
    file.write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    with pytest.raises(SpecError, match=said) as caught:
        load_rows(spec_of(file, columns, task, format="json", split={"validation": 1}), ["no", "yes"])
    assert caught.value.path == ("data", "columns", role)


def encoded(task, columns, rows):
    data = datasets.Dataset.from_dict(rows)
    return encode(spec_of("x", columns, task), data, make_tokenizer(), ["O", "N"])


def test_batches_are_padded_to_their_longest():
    tokenizer = make_tokenizer()
    rows = encoded("sequence-classification", COLUMNS, {"text": ["good", "the plot was bad", ""], "label": [1, 0, 0]})
    batch = task_of("sequence-classification").collator(tokenizer, NAMES, None)([rows[0], rows[1], rows[2]])
    assert list(batch) == ["input_ids", "attention_mask", "labels"]
    assert batch["attention_mask"].sum(1).tolist() == [3, 6, 2] and batch["input_ids"].shape == (3, 6)
    assert batch["labels"].tolist() == [1, 0, 0]


def test_next_token_labels():
    rows = encoded("causal-lm", {"text": "text"}, {"text": ["good film", "the plot was bad"]})
    tokenizer = make_tokenizer()
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = task_of("causal-lm").collator(tokenizer, NAMES, None)([rows[0], rows[1]])
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            real = ids[mask.bool()]
            assert labels[mask.bool()].tolist() == [*real[1:].tolist(), IGNORED]
            assert (labels[~mask.bool()] == IGNORED).all()


def test_tags_on_the_first_token_of_a_word():
    rows = encoded("token-classification", {"tokens": "w", "label": "t"}, {"w": [["good", "bad film"]], "t": [[0, 1]]})
    assert rows[0]["labels"] == [IGNORED, 0, 1, IGNORED, IGNORED]


def test_a_decoder_reads_the_shifted_labels():
    rows = encoded("seq2seq-lm", COLUMNS, {"text": ["good", "bad film"], "label": ["bad", "the good film"]})
    names = [*NAMES, "decoder_input_ids"]
    batch = task_of("seq2seq-lm").collator(make_tokenizer(), names, 2)([rows[0], rows[1]])
    assert batch["decoder_input_ids"][:, 0].tolist() == [2, 2]
    kept = batch["labels"][:, :-1]
    assert torch.equal(batch["decoder_input_ids"][:, 1:], kept.masked_fill(kept == IGNORED, 0))


def test_options_of_the_reader(tmp_path):
    """A table with tabs, no header, and quotes that mean nothing, as CoLA's."""
    file = tmp_path / "rows.tsv"
    file.write_text("".join(f'a{i}\t{i % 2}\t*\t"the plot\n' for i in range(10)))
    options = {"sep": "\t", "column_names": ["source", "label", "mark", "text"], "quoting": 3}
    rows = load_rows(spec_of(file, COLUMNS, options=options, split={"validation": 2}), ["0", "1"])
    assert len(rows.train) == 8 and rows.train["text"][0] == '"the plot'
    with pytest.raises(SpecError, match="csv has no option 'seperator', only chunksize, "):
        load_rows(spec_of(file, COLUMNS, options={"seperator": "x"}, split={"validation": 2}), ["0", "1"])
    with pytest.raises(ValueError, match="no 'data_files'"):
        spec_of(file, COLUMNS, options={"data_files": "/etc/passwd"})


def test_a_split_beside_validation_rows_is_refused(table):
    spec, files = spec_of(table, COLUMNS), dict.fromkeys(("train", "validation"), str(table))
    data = spec.data.model_copy(update={"files": files, "split": Split(validation=4)})
    with pytest.raises(SpecError, match="validation rows of its own") as error:
        load_rows(spec.model_copy(update={"data": data}), ["no", "yes"])
    assert error.value.path == ("data", "split")


def test_a_row_has_its_number_in_the_file(tmp_path):
    """In mistakes, and in what is said of chats, whatever is filtered and held out before."""
    (tmp_path / "rows.csv").write_text("text,label,source\n" + "x,0,b\n" * 5 + "x,0,a\n,1,a\n")
    spec = spec_of(tmp_path / "rows.csv", COLUMNS, where={"source": "a"}, split={"validation": 1})
    with pytest.raises(SpecError, match=r"row 6 of column 'text' holds no text \(null\)"):
        load_rows(spec, ["no", "yes"])


def test_what_is_said_of_chats_names_their_rows(tmp_path):
    turns = [{"role": "user", "content": "good"}, {"role": "assistant", "content": "film"}]
    long = [turns[0], {"role": "assistant", "content": "film " * 20}]
    chats = [turns, turns, turns[:1], [turns[1], *turns], long, [{"role": "system", "content": "a"}, *turns], turns]
    lines = [{"m": chat, "kept": i > 0} for i, chat in enumerate(chats)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    template = "{% for m in messages %}{{m.role + ' ' + m.content + ' '}}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant {% endif %}"
    said = {"split": {"validation": 1, "seed": 1}, "where": {"kept": True}, "format": "json"}
    spec = spec_of(tmp_path / "rows.jsonl", {"messages": "m"}, "causal-lm", template=template, **said)
    tokenizer, notes = make_tokenizer(), []
    tokenizer.chat_template = template
    rows = load_rows(spec, [])
    encode(spec, datasets.concatenate_datasets([rows.train, rows.validation]), tokenizer, [], notes)
    assert [note.partition(")")[0] for note in notes] == [
        "1 of 6 rows are cut to 12 tokens (row 4",
        "1 of 6 rows have nothing to learn from and are left out (row 2",
        "1 of 6 chats have roles out of order, or turns without text (row 3",
    ]
    assert notes[2].endswith("e.g. assistant after nobody")


@pytest.mark.parametrize("spelling", [str.lower, str.title, str.upper])
def test_truth_values_of_a_csv_file_are_read_as_any_writer_spells_them(spelling, tmp_path):
    yes, no = map(spelling, ("true", "false"))
    (tmp_path / "rows.csv").write_text("text,label,kept\n" + f"x,0,{yes}\n" * 3 + f"x,1,{no}\n" * 3)
    spec = spec_of(tmp_path / "rows.csv", COLUMNS, where={"kept": [True]}, split={"validation": 1})
    assert load_rows(spec, ["no", "yes"]).train["label"][:] == ["0", "0"]


def test_questions_that_are_too_long_are_said():
    short, long = (Question([1] * n, "a") for n in (7, 8))
    assert short_enough([short, long], None) == ([short, long], []) and short_enough([], 8) == ([], [])
    kept, notes = short_enough([long, short], 8)
    assert kept == [short] and notes[0].startswith("validation: 1 of 2 questions have 8 tokens or more")
    with pytest.raises(SpecError, match="1 of 1 questions have 8 tokens or more"):
        short_enough([long], 8)


def test_filters_of_lists_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "x", "label": 0, "tags": ["a"]}\n' * 3)
    spec = spec_of(tmp_path / "rows.jsonl", COLUMNS, format="json", where={"tags": "a"}, split={"validation": 1})
    with pytest.raises(SpecError, match="tags holds no texts, numbers or truth values") as error:
        load_rows(spec, ["no", "yes"])
    assert error.value.path == ("data", "where", "tags")


def test_where_nothing_is_learnt_it_is_said_why(tmp_path):
    turns = [{"role": "user", "content": "good " * 20}, {"role": "assistant", "content": "film"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"m": turns}) + "\n") * 3)
    spec = spec_of(tmp_path / "rows.jsonl", {"messages": "m"}, "causal-lm", format="json", split={"validation": 1})
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{m.role + ' ' + m.content + ' '}}{% endfor %}"
    with pytest.raises(
        SpecError, match=r"none of 2 rows has anything to learn from; 2 of 2 rows are cut to 12"
    ) as error:
        encode(spec, load_rows(spec, []).train, tokenizer, [])
    assert error.value.path == ("data", "max_length")
