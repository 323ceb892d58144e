"""What is asked of a run: rows are read or refused, one answer each."""

import json

import pytest
import torch
import transformers

from rewriter import Session, SubspanError
from rewriter.answer import answerer, rows_of
from rewriter.export.ship import load_tuned
from rewriter.spec import Spec
from tests.cases.tiny import LLAMA, task_spec
from tests.pipelines.test_run import call, fails
from tests.tiny import project


def asked(task, columns):
    data = {"format": "csv", "files": "rows.csv", "columns": columns}
    model = {"name": "model", "task": task}
    return Spec.model_validate(
        {"version": 1, "model": model, "data": data, "rules": [{"target": "**", "apply": ["full"]}]}
    )


TEXT = asked("sequence-classification", {"text": "a", "label": "b"})
WORDS = asked("token-classification", {"tokens": "a", "label": "b"})
IMAGE = asked("image-classification", {"image": "a", "label": "b"})
WRONG = [
    (TEXT, "{}", "row 1 has nothing; sequence-classification reads"),
    (TEXT, '{"txt": "a"}', "row 1 has txt; sequence-classification reads"),
    (TEXT, '{"text": "a", "text_pair": "b"}', "row 1 has text, text_pair; sequence-classification reads"),
    (TEXT, '{"text": null}', "row 1: text is null, no text or whole number"),
    (TEXT, '{"text": ["a"]}', 'row 1: text is ["a"], no text or whole number'),
    (TEXT, '{"text": 1.5}', "row 1: text is 1.5, no text or whole number"),
    (TEXT, '{"text": true}', "row 1: text is true, no text or whole number"),
    (TEXT, '{"text": ', "row 1 is no JSON"),
    (WORDS, '{"tokens": ["a", ""]}', 'row 1: tokens is ["a", ""], no list of words'),
    (WORDS, '{"tokens": [["a"]]}', 'row 1: tokens is [["a"]], no list of words'),
    (WORDS, '{"tokens": [1, null]}', "row 1: tokens is [1, null], no list of words"),
    (IMAGE, '{"image": 5}', "row 1: image is 5, no path of an image"),
    (IMAGE, '{"image": null}', "row 1: image is null, no path of an image"),
]


@pytest.mark.parametrize(("spec", "line", "said"), WRONG)
def test_what_is_no_row_is_refused(spec, line, said):
    with pytest.raises(SubspanError) as caught:
        rows_of(spec, [line])
    assert str(caught.value).startswith(said)


def test_what_is_a_row():
    assert rows_of(TEXT, ["a text", "", '{"text": 5}']) == [{"text": "a text"}, {"text": ""}, {"text": 5}]
    assert rows_of(TEXT, ['{"a": "x", "b": 1, "c": 2}']) == [{"text": "x"}]
    same = asked("sequence-classification", {"text": "text", "label": "label"})
    assert rows_of(same, ['{"text": "x", "label": 1}']) == [{"text": "x"}]
    assert rows_of(WORDS, ["two words", '{"tokens": ["one", 2]}']) == [
        {"tokens": ["two", "words"]},
        {"tokens": ["one", 2]},
    ]


def test_each_line_has_its_answer(tmp_path):
    Session(project(tmp_path), "train.max_steps=1").tune(tmp_path / "run")
    lines = ["good film", "", "bad " * 200, "😀"]
    found = call("run", tmp_path / "run", *lines, "--with", "tuned").stdout.splitlines()
    assert [set(json.loads(line)) for line in found] == [{"label", "scores"}] * 4
    (tmp_path / "asked.txt").write_text("\n".join(lines[:3]) + "\n")
    again = call("run", tmp_path / "run", "--file", tmp_path / "asked.txt", "--with", "tuned").stdout.splitlines()
    assert again == found[:3]
    noted = call("run", tmp_path / "run", *lines, "--with", "tuned").stderr.splitlines()
    assert [line.split(":")[0] for line in noted if "are cut to 16 tokens" in line] == ["row 3"]
    assert fails("run", tmp_path / "run", "a", "--file", tmp_path / "asked.txt") == "texts, or --file: not both"
    assert "merged is missing: subspan export" in fails("run", tmp_path / "run", "a", "--with", "merged")


def test_a_text_that_goes_on_is_read_whole(tmp_path):
    """Longer than what was tuned on, up to what the model takes."""
    config = transformers.LlamaConfig(**LLAMA)
    spec = task_spec(tmp_path, config, "CausalLM", "causal-lm", "**.{q,v}_proj.weight", train={"max_steps": 1})
    Session(spec).tune(tmp_path / "run")
    answer, text = answerer(spec, tmp_path / "run", "tuned", 4), "bad good film plot was " * 5
    _, processor, _, _, tuned = load_tuned(spec, tmp_path / "run")
    ids = torch.tensor([processor(text)["input_ids"]])
    whole = ids
    assert ids.shape[1] > spec.data.max_length
    for _ in range(4):
        with torch.no_grad():
            logits = tuned(input_ids=whole, attention_mask=torch.ones_like(whole))["logits"]
        whole = torch.cat([whole, logits[:, -1:].argmax(-1)], dim=1)
    assert answer({"text": text}) == {"text": processor.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)}
    with pytest.raises(SubspanError, match=r"the text has \d+ tokens; the model takes 64 with what it writes"):
        answer({"text": text * 3})
