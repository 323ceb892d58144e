"""Chats made of columns: which turns a row becomes, and what is refused."""

import json

import pytest
import transformers as hf

from rewriter import Session, SpecError, load_rows
from rewriter.answer import rows_of
from rewriter.errors import SubspanError
from rewriter.spec import Spec
from rewriter.spec.data import fields_of, filled
from tests.cases.tiny import LLAMA, saved
from tests.tasks.test_causal_lm import CHATML

CHAT = [{"system": "Be {{brief}}."}, {"user": "Good?\n{text}"}, {"assistant": "{label}"}]
VALUES = {"label": {0: "negative", 1: "positive"}}


def spec_of(files, format="csv", model="x", **data):
    data = {"format": format, "files": str(files), "split": {"validation": 1}, "chat": CHAT, "values": VALUES} | data
    return Spec.model_validate(
        {
            "version": 1,
            "model": {"name": str(model), "task": "causal-lm"},
            "data": {name: value for name, value in data.items() if value is not None},
            "rules": [{"target": "**.{q,v}_proj.weight", "apply": [{"lora": {"rank": 2}}]}],
            "train": {"max_steps": 2, "batch_size": 2},
        }
    )


def turns(spec):
    rows = load_rows(spec, [])
    return [json.loads(one) for part in (rows.train, rows.validation) for one in part["messages"]]


@pytest.fixture
def table(tmp_path):
    (tmp_path / "rows.csv").write_text('text,label,messages\n"a, {b}",0,x\nNA,1,y\n007,1,z\n')
    return tmp_path / "rows.csv"


@pytest.mark.parametrize(
    ("text", "names", "whole"),
    [
        ("{a} and {b c}{a}", ["a", "b c", "a"], "1 and 21"),
        ("{{a}} {a.b}", ["a.b"], "{a} 3"),
        ("no column", [], "no column"),
    ],
)
def test_what_stands_in_braces_is_a_column(text, names, whole):
    assert fields_of(text) == names
    assert filled(text, {"a": "1", "b c": "2", "a.b": "3"}) == whole


@pytest.mark.parametrize("text", ["{", "a}", "{}", "{a!r}", "{a:>3}", "{a{b}}"])
def test_other_braces_are_refused(text):
    with pytest.raises(ValueError, match="stands for a cell"):
        fields_of(text)


def test_cells_stand_in_turns_as_they_are_written(table):
    found = {one[1]["content"]: one for one in turns(spec_of(table))}
    assert set(found) == {"Good?\na, {b}", "Good?\nNA", "Good?\n007"}
    assert found["Good?\nNA"] == [
        {"role": "system", "content": "Be {brief}."},
        {"role": "user", "content": "Good?\nNA"},
        {"role": "assistant", "content": "positive"},
    ]


@pytest.mark.parametrize("label", [{"label": 1}, {"label": True}, {"label": "1"}])
def test_values_are_found_by_what_is_written(tmp_path, label):
    (tmp_path / "rows.jsonl").write_text((json.dumps({"text": "t"} | label) + "\n") * 2)
    key = {"label": True}.get("x", label["label"])
    spec = spec_of(tmp_path / "rows.jsonl", "json", values={"label": {key: "yes"}})
    assert [one[-1]["content"] for one in turns(spec)] == ["yes", "yes"]


@pytest.mark.parametrize(
    ("data", "path", "said"),
    [
        ({"chat": [{"user": "{txt}"}, {"assistant": "{label}"}]}, ("data", "chat", 0, "user"), "no column 'txt'"),
        ({"values": {"label": {0: "negative"}}}, ("data", "values", "label"), "row 1 .* holds '1', which is none of 0"),
    ],
)
def test_refused_with_the_data(table, data, path, said):
    with pytest.raises(SpecError, match=said) as error:
        turns(spec_of(table, **data))
    assert error.value.path == path


def test_a_cell_without_a_text_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "t", "label": 1}\n{"text": null, "label": 1}\n')
    with pytest.raises(SpecError, match="row 1 of column 'text' holds no text"):
        turns(spec_of(tmp_path / "rows.jsonl", "json"))
    (tmp_path / "rows.jsonl").write_text('{"text": ["t"], "label": 1}\n' * 2)
    with pytest.raises(SpecError, match="column 'text' holds no texts"):
        turns(spec_of(tmp_path / "rows.jsonl", "json"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"chat": None}, "there is no `chat`"),
        ({"values": {"other": {1: "a"}}}, "'other', which no turn"),
        ({"columns": {"text": "text"}}, "leave out `columns`"),
        ({"turns": {"role": "from"}}, "for a column of turns"),
        ({"columns": {"messages": "messages", "tools": "text"}}, "both read 'text'"),
        ({"chat": CHAT[:2], "values": None}, "the last turn of `chat` is the assistant's"),
        ({"chat": CHAT[2:]}, "others come before"),
        ({"chat": [{"user": "{text"}, {"assistant": "a"}], "values": None}, "stands for a cell"),
        ({"chat": [{"users": "{text}"}, {"assistant": "a"}], "values": None}, "'assistant'"),
    ],
)
def test_refused_with_the_spec(data, said):
    with pytest.raises(ValueError, match=said):
        spec_of("rows.csv", **({"columns": {"messages": "m"}} if data.get("chat", 0) is None else {}), **data)


def test_other_tasks_read_no_chats():
    spec = spec_of("rows.csv").model_dump(by_alias=True)
    spec["model"]["task"] = "seq2seq-lm"
    with pytest.raises(SpecError, match="seq2seq-lm reads no chats") as error:
        Spec.model_validate(spec)
    assert error.value.path == ("data", "chat")


@pytest.mark.parametrize("line", ["a film", '{"text": "a film"}', '{"text": "a film", "label": 0, "id": 3}'])
def test_what_is_asked_is_put_in_the_turns(table, line):
    assert rows_of(spec_of(table), [line]) == [
        {"messages": [{"role": "system", "content": "Be {brief}."}, {"role": "user", "content": "Good?\na film"}]}
    ]


def test_a_whole_chat_is_asked_as_it_is_and_other_columns_are_said(table):
    said = [{"role": "user", "content": "hello"}]
    assert rows_of(spec_of(table), [json.dumps({"messages": said})]) == [{"messages": said}]
    with pytest.raises(SubspanError, match=r'row 1 has no text; data.chat asks of {"text": "\.\.\."}'):
        rows_of(spec_of(table), ['{"txt": "a"}'])
    with pytest.raises(SubspanError, match=r"row 1 of column 'text' holds no text \(1.5\)"):
        rows_of(spec_of(table), ['{"text": 1.5}'])
    two = [{"user": "{text} {label}"}, {"assistant": "ok"}]
    with pytest.raises(SubspanError, match=r"asks of .*text.*label"):
        rows_of(spec_of(table, chat=two), ["a film"])
    assert rows_of(spec_of(table, chat=two), ['{"text": "t", "label": 1}'])[0]["messages"][0]["content"] == "t positive"


def test_a_run_of_them(table, tmp_path):
    saved(tmp_path / "model", hf.LlamaConfig(**LLAMA), "CausalLM")
    spec = spec_of(table, model=tmp_path / "model", template=CHATML, max_length=64)
    train = spec.train.model_copy(update={"evaluate_start": True, "metric": "exact_match"})
    metrics = Session(spec.model_copy(update={"train": train})).tune(tmp_path / "run")
    assert metrics["before"].keys() == {"perplexity", "loss", "exact_match", "rouge", "bleu", "stopped"}
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[0]["step"] == 0 and log[0]["eval_loss"] == metrics["before"]["loss"]
    assert metrics["evaluations"]["best"] in (1, 2)
