"""Texts, completions and chats as rows: what is read, what is learnt, what becomes of long ones."""

import json

import datasets
import pytest
import torch
import transformers as hf

from rewriter import Session, SpecError
from rewriter.answer import answerer, rows_of
from rewriter.data import encode, tie
from rewriter.export.ship import load_tuned
from rewriter.spec import Spec, dump_spec
from rewriter.spec.places import parse
from rewriter.tasks import IGNORED, task_of
from tests.cases.tiny import LLAMA, saved
from tests.pipelines.test_run import fails, succeeds
from tests.tiny import make_tokenizer

CHATML = (
    "{% for m in messages %}{{'[CLS] ' + m.role + ' ' + m.content + ' [SEP] '}}{% endfor %}"
    "{% if add_generation_prompt %}{{'[CLS] assistant '}}{% endif %}"
)
TEXTS = ["good film", "bad the plot was bad", "a fine film and a good plot"]


def spec_of(model="model", files="rows.jsonl", **data):
    data = {"format": "json", "files": str(files), "split": {"validation": 8}, "max_length": 32, **data}
    rule = {"target": "**.{q,v}_proj.weight", "apply": [{"lora": {"rank": 2}}]}
    train = {"max_steps": 3, "batch_size": 4}
    model = {"name": str(model), "task": "causal-lm"}
    return Spec.model_validate({"version": 1, "model": model, "data": data, "rules": [rule], "train": train})


def read(rows, **data):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    notes = []
    found = encode(spec_of(**data), datasets.Dataset.from_list(rows), tokenizer, [], notes)
    return tokenizer, found, notes


def learnt(tokenizer, row):
    return tokenizer.decode([one for one in row["labels"] if one != IGNORED])


def test_a_completion_is_learnt_with_its_end():
    rows = [{"p": "good film", "c": " bad plot"}, {"p": "the", "c": " plot"}]
    columns = {"prompt": "p", "completion": "c"}
    tokenizer, found, _ = read(rows, columns=columns)
    assert tokenizer.decode(found[0]["input_ids"]) == "[CLS] good film bad plot [SEP]"
    assert [learnt(tokenizer, row) for row in found] == ["bad plot [SEP]", "plot [SEP]"]
    everything = read(rows, columns=columns, loss="all")[1]
    assert learnt(tokenizer, everything[0]) == "good film bad plot [SEP]"


def test_a_chat_is_read_once_and_its_answers_are_learnt():
    turns = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "good film"}]
    rows = [{"m": turns}, {"m": turns * 2}, {"m": turns[:1]}]
    tokenizer, found, notes = read(rows, columns={"messages": "m"})
    assert [learnt(tokenizer, row) for row in found] == ["good film [SEP]", "good film [SEP] good film [SEP]"]
    assert notes == ["1 of 3 rows have nothing to learn from and are left out"]
    ids = found[0]["input_ids"]
    assert ids.count(tokenizer.cls_token_id) == ids.count(tokenizer.sep_token_id) == 2
    named = [{"m": json.dumps([{"from": "human", "value": "the film"}, {"from": "gpt", "value": "good film"}])}]
    spoken = {"role": "from", "content": "value", "roles": {"human": "user", "gpt": "assistant"}}
    assert read(named, columns={"messages": "m"}, turns=spoken)[1][0]["labels"] == found[0]["labels"]
    with pytest.raises(SpecError, match="row 1 of column 'm': turn 0 has the role 'bot'"):
        read([{"m": turns}, {"m": [{"role": "bot", "content": "a"}]}], columns={"messages": "m"})


def test_a_template_that_ends_no_turn_gets_the_end_token():
    turns = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "good film"}]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{m.role + ' ' + m.content + ' '}}{% endfor %}"
    found = encode(spec_of(columns={"messages": "m"}), datasets.Dataset.from_list([{"m": turns}]), tokenizer, [])
    assert learnt(tokenizer, found[0]) == "[UNK] good film [SEP]"


def test_losses_and_gradients_are_those_of_transformers():
    """Of whole chats with labels where they are learnt; the mean is over the batch's learnt tokens."""
    turns = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "good film"}]
    tokenizer, found, _ = read([{"m": turns}, {"m": [*turns, *turns]}], columns={"messages": "m"})
    task = task_of("causal-lm")
    batch = task.collator(tokenizer, ["input_ids", "attention_mask"], None)(list(found))
    own, theirs = (hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)).double() for _ in range(2))
    theirs.load_state_dict(own.state_dict())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    loss = task.loss(own(**inputs), batch) / task.count(batch)
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for i, row in enumerate(found):
        marks = torch.tensor(task.marks(row))
        labels[i, : len(marks)][marks] = torch.tensor(row["input_ids"])[marks]
    expected = theirs(**inputs, labels=labels).loss
    torch.testing.assert_close(
        loss.float(), expected, rtol=1e-6, atol=0.0
    )  # The loss is taken in float32 in transformers.
    loss.backward()
    expected.backward()
    for one, other in zip(own.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_long_texts_are_cut_split_or_refused():
    rows = [{"text": "good film " * 5}, {"text": "bad"}]
    options = {"columns": {"text": "text"}, "max_length": 5}
    tokenizer, cut, notes = read(rows, **options)
    assert [len(row["input_ids"]) for row in cut] == [5, 3] and len(learnt(tokenizer, cut[0]).split()) == 4
    assert "1 of 2 rows are cut to 5 tokens: 46.7% of all tokens are not read" in notes[0]
    _, split, notes = read(rows, **options, long="split")
    assert [len(row["input_ids"]) for row in split] == [5, 5, 2, 3] and not notes
    whole = [one for row in list(split)[:3] for one in row["labels"]]
    assert (
        tokenizer.decode(whole[:-1]) == "good film good film good film good film good film [SEP]"
        and whole[-1] == IGNORED
    )
    with pytest.raises(SpecError, match=r"a text has 12 tokens: .* data\.long: truncate or split") as caught:
        read(rows, **options, long="refuse")
    assert caught.value.path == ("data", "max_length")


WRONG = [
    (
        {"columns": {"text": "a", "messages": "b"}},
        "or messages and tools, or prompt and completion; not text, messages",
    ),
    ({"columns": {"text": "a", "tools": "b"}}, "or messages and tools, or prompt and completion; not text, tools"),
    ({"columns": {"prompt": "a"}}, "causal-lm reads text, or messages, or messages and tools, or .*; not prompt"),
    ({"columns": {"text": "a"}, "loss": "assistant"}, "the columns text have no assistant"),
    ({"columns": {"messages": "a"}, "loss": "completion"}, "the columns messages have no completion"),
    ({"columns": {"text": "a"}, "template": "{{x}}"}, "it is for the column messages"),
]


@pytest.mark.parametrize(("data", "said"), WRONG)
def test_what_does_not_go_together_is_refused(data, said):
    with pytest.raises(SpecError, match=said):
        spec_of(**data)


def test_a_run_of_chats_asks_by_the_template(tmp_path):
    saved(tmp_path / "model", hf.LlamaConfig(**LLAMA), "CausalLM")
    turns = lambda i: [{"role": "user", "content": TEXTS[i % 3]}, {"role": "assistant", "content": TEXTS[(i + 1) % 3]}]  # noqa: E731
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"chat": turns(i)}) + "\n" for i in range(40)))
    data = {"columns": {"messages": "chat"}, "template": CHATML}
    spec = spec_of(tmp_path / "model", tmp_path / "rows.jsonl", **data)
    session = Session(spec)
    session.tune(tmp_path / "run")
    session.export()
    (row,) = rows_of(spec, ["good film"])
    assert row == {"messages": [{"role": "user", "content": "good film"}]}
    assert rows_of(spec, [json.dumps({"chat": turns(0), "id": 3})]) == [{"messages": turns(0)[:1]}]
    tuned = load_tuned(spec, tmp_path / "run")[-1]
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "run" / "merged")
    assert tokenizer.chat_template == CHATML
    for name in ("config", "generation_config"):
        written = json.loads((tmp_path / "run" / "merged" / f"{name}.json").read_text())
        assert written["eos_token_id"] == tokenizer.sep_token_id
    written = json.loads((tmp_path / "run" / "onnx" / "genai_config.json").read_text())
    assert written["model"]["eos_token_id"] == tokenizer.sep_token_id
    ids = torch.tensor([tokenizer("[CLS] user good film [SEP] [CLS] assistant", add_special_tokens=False)["input_ids"]])
    start = ids.shape[1]
    for _ in range(3):
        with torch.no_grad():
            logits = tuned(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    written = answerer(spec, tmp_path / "run", "onnx", 3)(row)["text"]
    assert written == tokenizer.decode(ids[0, start:], skip_special_tokens=True).partition("[SEP]")[0]
    assert "row 1: no turns" in fails("run", tmp_path / "run", '{"messages": []}')


def test_rows_are_shown_as_they_are_read(tmp_path):
    saved(tmp_path / "model", hf.LlamaConfig(**LLAMA), "CausalLM")
    turns = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "good film"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"m": turns}) + "\n") * 9)
    spec = spec_of(tmp_path / "model", tmp_path / "rows.jsonl", columns={"messages": "m"}, template=CHATML)
    (tmp_path / "spec.yaml").write_text(dump_spec(spec))
    said = succeeds("data", tmp_path / "spec.yaml", "--rows", 1, "--set", "data.split.validation=1")
    lines = said.splitlines()
    assert lines[1] == "[CLS] [UNK] the film [SEP] [CLS] [UNK]⟦good film [SEP]⟧" and "1 of 8: 10 tokens" in lines[0]
    assert "8 rows, 80 tokens, 24 of them learnt" in said and "10 to 10            8" in said
    (tmp_path / "rows.jsonl").write_text('{"m": [{"role": "bot", "content": "a"}]}\n' * 9)
    assert "row 0 of column 'm': turn 0 has the role 'bot'" in fails("data", tmp_path / "spec.yaml")


def test_a_start_token_stands_once_and_an_empty_text_has_none():
    core = make_tokenizer()
    core.bos_token = "[CLS]"
    rows = [{"t": "[CLS] good film [SEP]"}, {"t": "good film"}, {"t": ""}]
    notes = []
    found = encode(spec_of(columns={"text": "t"}), datasets.Dataset.from_list(rows), core, [], notes)
    assert [core.decode(row) for row in found["input_ids"]] == ["[CLS] good film [SEP]"] * 2
    assert notes == ["1 of 3 rows have nothing to learn from and are left out"]
    rows = [{"p": "[CLS] good", "c": " film [SEP]"}]
    columns = {"prompt": "p", "completion": "c"}
    found = encode(spec_of(columns=columns), datasets.Dataset.from_list(rows), core, [])
    assert core.decode(found[0]["input_ids"]) == "[CLS] good film [SEP]" and learnt(core, found[0]) == "film [SEP]"
    assert core.decode(spec_of(columns=columns).task.starts({"prompt": "[CLS] good"}, core)) == "[CLS] good"


def test_what_ends_no_text_and_what_ends_one_within_are_said():
    core, notes = make_tokenizer(), []
    core.eos_token = None
    encode(spec_of(columns={"text": "t"}), datasets.Dataset.from_list([{"t": "good film"}]), core, [], notes)
    assert len(notes) == 1 and "no token that ends a text: none is learnt" in notes[0]
    turns = [{"role": "user", "content": "good [SEP] film"}, {"role": "assistant", "content": "  "}]
    _, _, notes = read(
        [{"m": turns}, {"m": [*turns[:1], {"role": "assistant", "content": "a"}]}], columns={"messages": "m"}
    )
    assert notes[0].startswith("1 of 2 chats have roles out of order, or turns without text")
    assert "2 of 2 chats have special tokens in their texts, which are read as such, e.g. [SEP]" in notes[1]


def test_a_template_without_a_generation_prompt_is_said():
    """What starts the assistant's turn is learnt then, and written before each answer."""
    core, notes = make_tokenizer(), []
    turns = [{"role": role, "content": "good film"} for role in ("user", "assistant")]
    rows = datasets.Dataset.from_list([{"m": turns}])
    core.chat_template = CHATML
    encode(spec_of(columns={"messages": "m"}), rows, core, [], notes)
    assert notes == []
    core.chat_template = "{% for m in messages %}{{m.role + ' ' + m.content + ' [SEP] '}}{% endfor %}"
    encode(spec_of(columns={"messages": "m"}), rows, core, [], notes)
    assert len(notes) == 1 and "adds nothing where an answer is asked for" in notes[0] and "'assistant '" in notes[0]
    core.chat_template = "{% for m in messages %}{{m.content + ' [SEP] '}}{% endfor %}"
    encode(spec_of(columns={"messages": "m"}), rows, core, [], notes)
    assert len(notes) == 1


def test_a_template_that_reads_the_clock_is_said_and_ties_a_run_to_the_rows_as_read():
    core = make_tokenizer()
    rows = datasets.Dataset.from_list([{"m": 1}])
    assert tie(rows, rows.rename_column("m", "n"), core) != tie(rows, rows, core)
    core.chat_template = "{{strftime_now('%d %b %Y')}}" + CHATML
    assert tie(rows, rows.rename_column("m", "n"), core) == tie(rows, rows, core)
    notes, turns = [], [{"role": role, "content": "film"} for role in ("user", "assistant")]
    encode(spec_of(columns={"messages": "m"}), datasets.Dataset.from_list([{"m": turns}]), core, [], notes)
    assert notes == ["the chat template reads the clock (strftime_now): rows of another day are others"]


@pytest.mark.parametrize(("words", "parts", "learnt"), [(4, [3, 3], 5), (6, [3, 3, 2], 7), (5, [3, 3], 6), (2, [3], 3)])
def test_a_text_that_is_split_learns_every_token_but_the_first(tmp_path, words, parts, learnt):
    """A start and an end token are two more; a last token alone is no row: it is learnt in the part before."""
    saved(tmp_path / "model", hf.LlamaConfig(**LLAMA), "CausalLM")
    (tmp_path / "rows.jsonl").write_text((json.dumps({"t": " ".join(["film"] * words)}) + "\n") * 2)
    spec = spec_of(
        tmp_path / "model", tmp_path / "rows.jsonl", columns={"text": "t"}, max_length=3, long="split", loss=None
    )
    (tmp_path / "spec.yaml").write_text(dump_spec(spec))
    said = succeeds("data", tmp_path / "spec.yaml", "--rows", 2, "--set", "data.split.validation=1")
    count = sum(parts)
    assert f"{len(parts)} rows, {count} tokens, {learnt} of them learnt" in said and "left out" not in said
    if len(parts) > 1:
        assert said.splitlines()[1] == "[CLS]⟦film film⟧" and said.splitlines()[3].startswith("⟦film film ")


def test_a_template_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"chat\.jinja: no such file"):
        spec_of(columns={"messages": "m"}, template="chat.jinja")
    (tmp_path / "empty").write_text("no template")
    with pytest.raises(ValueError, match="holds no chat template"):
        spec_of(columns={"messages": "m"}, template=str(tmp_path / "empty"))


def test_a_template_file_is_part_of_the_run(tmp_path):
    """The file is read with the spec: what ships is what was tuned, whatever becomes of it."""
    (tmp_path / "chat.jinja").write_text(CHATML)
    spec = spec_of(columns={"messages": "m"}, template=str(tmp_path / "chat.jinja"))
    assert spec.data.template == CHATML and Spec.model_validate(parse(dump_spec(spec)).data) == spec


def test_a_template_that_drops_the_last_turn_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML.replace("in messages %", "in messages[:2] %")
    turns = [{"role": role, "content": "good film"} for role in ("user", "assistant")] * 2
    with pytest.raises(SpecError, match="leaves out turn 2, the user's"):
        encode(spec_of(columns={"messages": "m"}), datasets.Dataset.from_list([{"m": turns}]), tokenizer, [])
