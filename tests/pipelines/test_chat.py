"""A talk with a run: turns are remembered and forgotten, stages answer, and what comes in pieces is whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers as hf
import typer
from typer.testing import CliRunner

from pipelines import chat
from pipelines.run import run as ask
from rewriter import Session
from rewriter.answer import _Pieces, answerer
from rewriter.spec import Spec
from tests.cases.tiny import LLAMA, saved, task_spec
from tests.pipelines.test_run import fails, succeeds
from tests.tiny import project

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}{{m.role + ' ' + m.content + ' [SEP] '}}{% endfor %}"
    "{% if add_generation_prompt %}{{'assistant '}}{% endif %}"
)
CHAT = [{"role": "user", "content": "good film"}, {"role": "assistant", "content": "the plot was bad"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tuned run of chats, not exported, that says other things than its base."""
    folder = tmp_path_factory.mktemp("chats")
    saved(folder / "model", hf.LlamaConfig(**LLAMA), "CausalLM")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"messages": CHAT}) for _ in range(12)))
    columns = {"messages": "messages"}
    data = {"format": "json", "files": str(folder / "rows.jsonl"), "columns": columns, "split": {"validation": 2}}
    train = {"max_steps": 20, "batch_size": 4, "learning_rate": 0.1}
    spec = {
        "version": 1,
        "model": {"name": str(folder / "model"), "task": "causal-lm"},
        "data": {**data, "template": TEMPLATE, "max_length": 32},
        "rules": [{"target": "**.{q,v,up,down}_proj.weight", "apply": [{"lora": {"rank": 4}}]}],
        "train": train,
    }
    Session(Spec.model_validate(spec)).tune(folder / "run")
    return folder / "run"


def talked(run, text, *more):
    command = typer.Typer(pretty_exceptions_enable=False)
    command.command()(ask)
    done = CliRunner().invoke(command, [str(run), "--chat", "--tokens", "6", *more], input=text)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout.split("\n")[:-1], done.stderr


def answered(run, turns, stage="tuned"):
    from rewriter.folder import spec_of

    return answerer(spec_of(run), run, stage, 6)({"messages": turns})["text"]


def test_turns_are_remembered_until_they_are_forgotten(run):
    user, assistant, system = ({"role": one} for one in ("user", "assistant", "system"))
    said, _ = talked(run, "good film\nand the film\n\n/reset\nand the film\n/exit\nmore\n", "--with", "tuned")
    first = answered(run, [user | {"content": "good film"}])
    then = [user | {"content": "good film"}, assistant | {"content": first}, user | {"content": "and the film"}]
    assert first == "the plot was bad"
    assert said == [first, answered(run, then), answered(run, then[-1:])]
    told, _ = talked(run, "good film", "--with", "tuned", "--system", "a fine plot")
    assert told == [answered(run, [system | {"content": "a fine plot"}, user | {"content": "good film"}])]


def test_the_base_is_without_what_was_tuned(run):
    said, _ = talked(run, "good film\n", "--with", "base")
    spec_turns = [{"role": "user", "content": "good film"}]
    model = hf.AutoModelForCausalLM.from_pretrained(run.parent / "model")
    processor = hf.AutoTokenizer.from_pretrained(run.parent / "model")
    processor.chat_template = TEMPLATE
    text = processor.apply_chat_template(spec_turns, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([processor(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=3, pad_token_id=0)[0, ids.shape[1] :]
    assert said == [processor.decode(out, skip_special_tokens=True)] != ["the plot was bad"]
    lines = succeeds("run", run, "good film", "--tokens", "6", "--with", "tuned", "--with", "base").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"with": "tuned", "text": "the plot was bad"},
        {"with": "base", "text": said[0]},
    ]


def test_a_line_that_can_t_be_answered_is_said_and_forgotten(run):
    said, error = talked(run, "good " * 80 + "\ngood film\n", "--with", "tuned")
    assert said == ["the plot was bad"] and "the model takes 64 with what it writes" in error


def test_a_line_by_itself_where_there_are_no_chats(tmp_path):
    spec = task_spec(
        tmp_path, hf.LlamaConfig(**LLAMA), "CausalLM", "causal-lm", "**.q_proj.weight", train={"max_steps": 1}
    )
    Session(spec).tune(tmp_path / "run")
    said, _ = talked(tmp_path / "run", "good film\nbad\n", "--with", "tuned")
    answer = answerer(spec, tmp_path / "run", "tuned", 6)
    assert said == [answer({"text": "good film"})["text"], answer({"text": "bad"})["text"]]
    assert fails("run", tmp_path / "run", "--chat", "--system", "x") == "--system is for runs whose data has chats"


def test_what_is_refused(run, tmp_path):
    Session(project(tmp_path), "train.max_steps=1").tune(tmp_path / "run")
    line = fails("run", tmp_path / "run", "--chat", "--with", "tuned")
    assert line == "sequence-classification writes no text: ask it without --chat"
    assert "--chat reads stdin" in fails("run", run, "good", "--chat")
    assert "subspan export" in fails("run", run, "--chat")


def test_a_text_after_what_the_system_says(run):
    whole = {"messages": [{"role": "system", "content": "bad"}, {"role": "user", "content": "good"}]}
    said = succeeds("run", run, "--with", "tuned", "--tokens", "4", json.dumps(whole))
    assert succeeds("run", run, "--with", "tuned", "--tokens", "4", "--system", "bad", "good") == said
    assert "not both" in fails("run", run, "--with", "tuned", "--system", "bad", json.dumps(whole))


def test_ctrl_c_stops_an_answer_and_keeps_what_there_was(monkeypatch, capsys):
    def answer(row, tell):
        tell("the ")
        raise KeyboardInterrupt

    assert chat._said(answer, dict) == "the " and capsys.readouterr().out == "the \n"


def test_pieces_are_whole_characters():
    core = tokenizers.Tokenizer(tokenizers.models.BPE({}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(["a"], trainer)
    processor, text, told = hf.PreTrainedTokenizerFast(tokenizer_object=core), "añ 😀語\n b", []
    pieces = _Pieces(processor, told.append)
    ids = processor(text)["input_ids"]
    assert len(ids) == len(text.encode())
    for token in ids:
        pieces.add(0, token)
    assert told == list(text)
    cut = processor.decode(ids[:6])
    told.clear()
    pieces = _Pieces(processor, told.append)
    for token in ids[:6]:
        pieces.add(0, token)
    assert "".join(told) == "añ "
    pieces.close(cut)
    assert "".join(told) == cut and cut.endswith("\ufffd")


def test_stdin_of_a_pipe(run):
    command = [sys.executable, ROOT / "pipelines" / "run.py", run, "--chat", "--with", "tuned", "--tokens", "6"]
    done = subprocess.run(command, input="good film\n", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "the plot was bad\n"), done.stderr
