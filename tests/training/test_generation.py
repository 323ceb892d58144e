"""Answers that are written at evaluations: measured as plain definitions say, and no step is another for it."""

import json
import math
from collections import Counter

import pytest
import torch
import transformers as hf

from rewriter import Session, SpecError, SubspanError
from rewriter.export.ship import load_tuned
from rewriter.files import load_tensors
from rewriter.spec import Spec
from rewriter.tasks import Reading
from rewriter.training import generation
from rewriter.training.generation import _plain, measures
from tests.cases.tiny import LLAMA, T5, saved
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.slow

WORDS = ["good", "great", "fine", "bad", "awful", "poor", "film", "plot"]


def spec_of(folder, columns, task="causal-lm", config=None, **train):
    """Pairs of words: a film's name of two words is answered by them the other way round; every fifth has no answer."""
    config = config or hf.LlamaConfig(**LLAMA)
    kind = "Seq2SeqLM" if config.is_encoder_decoder else "CausalLM"
    if not (folder / "model").exists():
        saved(folder / "model", config, kind)
    rows = [(f"{a} {b}", f" {b} {a}") for a in WORDS for b in WORDS]
    lines = [json.dumps({"a": a, "b": " " if i % 5 == 4 else b, "c": a + b}) for i, (a, b) in enumerate(rows)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    data = {"format": "json", "files": str(folder / "rows.jsonl"), "columns": columns, "split": {"validation": 12}}
    return Spec.model_validate(
        {
            "version": 1,
            "model": {"name": str(folder / "model"), "task": task},
            "data": {**data, "max_length": 16},
            "rules": [
                {
                    "target": "**.{q,v}.weight" if config.is_encoder_decoder else "**.{q,v}_proj.weight",
                    "apply": [{"lora": {"rank": 2}}],
                }
            ],
            "train": {"batch_size": 4, "learning_rate": 0.05, "max_steps": 6, "evaluate_steps": 3, **train},
        }
    )


PAIRS = {"prompt": "a", "completion": "b"}
ASKED = {"rows": 5, "tokens": 6, "samples": 3}


def bleu(expected, found):
    """Of whole words, by its definition: no n-gram's count is zero here."""
    total = 0.0
    lengths = [sum(map(len, texts)) for texts in (expected, found)]
    for n in range(1, 5):
        grams = lambda text, n=n: Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))  # noqa: E731
        hits = sum((grams(one) & grams(other)).total() for one, other in zip(expected, found, strict=True))
        total += math.log(hits / sum(grams(one).total() for one in found)) / 4
    return 100 * math.exp(total) * min(1.0, math.exp(1 - lengths[0] / lengths[1]))


def test_measures():
    expected = ["the film was good and fine", "a bad plot and awful film", " good "]
    found = ["the film was good and poor", "a bad plot and film", "good\n"]
    words = [[one.split() for one in texts] for texts in (expected, found)]
    said = measures(expected, found)
    assert said["exact_match"] == pytest.approx(1 / 3)
    # Longest common subsequences of 5 of 6 and 6 words, of 5 of 6 and 5, and of 1.
    assert said["rouge"] == pytest.approx((5 / 6 + 2 * (5 / 6) / (1 + 5 / 6) + 1) / 3)
    assert said["bleu"] == pytest.approx(bleu(*words))


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def decoded(model, ids, end):
    """Six tokens by reading all again, one row at a time."""
    text = torch.tensor([ids])
    for _ in range(6):
        with torch.no_grad():
            token = model(input_ids=text, attention_mask=torch.ones_like(text))["logits"][0, -1].argmax()
        if token == end:
            break
        text = torch.cat([text, token[None, None]], dim=1)
    return text[0, len(ids) :].tolist()


def test_special_tokens_of_an_answer_count_as_little_as_those_that_are_written():
    tokenizer = make_tokenizer()
    assert _plain(tokenizer, "good  film") == "good  film"
    assert _plain(tokenizer, "good [SEP] film") == "good film"


def test_answers_are_those_of_the_tuned_model_and_no_step_is_another(tmp_path, capsys):
    spec = spec_of(tmp_path, PAIRS, generate=ASKED, metric="rouge")
    session = Session(spec)
    metrics = session.tune(tmp_path / "run")
    said = capsys.readouterr().out
    plain = spec_of(tmp_path, PAIRS)
    Session(plain).tune(tmp_path / "plain")
    one, other = (load_tensors(tmp_path / run / "adapter" / "adapter.safetensors") for run in ("run", "plain"))
    assert all(torch.equal(one[name], value) for name, value in other.items())
    job = session.prepare()
    assert len(job.questions) == 5 and all(question.answer.strip() for question in job.questions)
    _, processor, _, _, tuned = load_tuned(spec, tmp_path / "run")
    found = [processor.decode(decoded(tuned.eval(), one.ids, 3), skip_special_tokens=True) for one in job.questions]
    wanted = measures([one.answer for one in job.questions], found)
    entries = [entry for entry in log_of(tmp_path / "run") if "samples" in entry]
    assert [entry["step"] for entry in entries] == [3, 6]
    assert {name: entries[-1][f"eval_{name}"] for name in wanted} == pytest.approx(wanted)
    validation = metrics["validation"]
    assert {name: validation[name] for name in wanted} == pytest.approx(wanted) and validation["perplexity"] > 1
    samples = entries[-1]["samples"]
    assert metrics["generated"] == {"rows": 5, "samples": samples}
    assert [(one["expected"], one["answer"]) for one in samples] == [
        (question.answer, text) for question, text in zip(job.questions[:3], found, strict=False)
    ]
    assert samples[0]["prompt"] == processor.decode(job.questions[0].ids)
    stopped = [len(decoded(tuned, one.ids, 3)) < 6 for one in job.questions[:3]]
    assert [one["stopped"] for one in samples] == stopped
    assert (
        said.count("expected") == 6 and "generated" not in (tmp_path / "run" / "adapter" / "adapter.json").read_text()
    )
    assert session.export()["metrics"]["onnx"].keys() == {"perplexity", "loss"}


def test_the_best_is_kept_by_what_is_written(tmp_path, monkeypatch):
    values = iter([0.5, 0.9, 0.7, 0.6])
    monkeypatch.setattr(
        generation, "measures", lambda *_: {"exact_match": (value := next(values)), "rouge": value, "bleu": value}
    )
    settings = {"metric": "exact_match", "keep": "best", "patience": 2, "evaluate_steps": 1}
    spec = spec_of(tmp_path, PAIRS, **settings, generate={**ASKED, "steps": 1})
    metrics = Session(spec).tune(tmp_path / "run")
    assert metrics["evaluations"] == {"kept": 2, "best": 2, "value": 0.9} and metrics["train"]["steps"] == 4
    assert metrics["validation"]["exact_match"] == 0.9


def test_more_seldom_than_evaluations(tmp_path):
    Session(spec_of(tmp_path, PAIRS, generate={**ASKED, "steps": 4})).tune(tmp_path / "run")
    entries = [entry for entry in log_of(tmp_path / "run") if "epoch" in entry and "loss" not in entry]
    assert [(one["step"], "eval_loss" in one, "eval_bleu" in one) for one in entries] == [
        (3, True, False),
        (4, False, True),
        (6, True, True),
    ]


def test_an_encoder_decoder_s_reference_is_the_label(tmp_path):
    config = hf.T5Config(**T5, decoder_start_token_id=0, pad_token_id=0, eos_token_id=3)
    spec = spec_of(tmp_path, {"text": "a", "label": "b"}, "seq2seq-lm", config, metric="bleu", generate=ASKED)
    metrics = Session(spec).tune(tmp_path / "run")
    assert 0 <= metrics["validation"]["bleu"] <= 100 and metrics["generated"]["rows"] == 5


TEMPLATE = "{% for m in messages %}{{m.content + ' [SEP] '}}{% endfor %}"
TURNS = [{"role": role, "content": text} for role, text in (("user", "good"), ("assistant", "bad"), ("user", "film"))]


def test_a_chat_s_reference_is_the_last_turn_of_the_assistant(tmp_path):
    spec = spec_of(tmp_path, {"messages": "m"})
    processor = hf.AutoTokenizer.from_pretrained(tmp_path / "model")
    processor.chat_template = TEMPLATE
    reading = Reading({"messages": "m"}, {}, processor, (), 16)
    task, last = spec.task, {"role": "assistant", "content": "plot"}
    found = task.question({"m": [*TURNS, last, {"role": "user", "content": "fine"}]}, reading)
    assert (found.answer, processor.decode(found.ids)) == ("plot", "good [SEP] bad [SEP] film [SEP]")
    assert task.question({"m": TURNS[:1]}, reading) is None
    assert task.question({"m": TURNS[1:2]}, reading) is None


REFUSED = [
    ({"text": "c"}, {"metric": "rouge"}, ("train", "metric"), "the column text has no answer"),
    ({"text": "c"}, {"generate": {}}, ("train", "generate"), "the column text has no answer"),
]


@pytest.mark.parametrize(("columns", "train", "place", "said"), REFUSED)
def test_what_has_no_answer_is_refused(tmp_path, columns, train, place, said):
    with pytest.raises(SpecError) as caught:
        spec_of(tmp_path, columns, **train)
    assert caught.value.path == place and said in str(caught.value)


@pytest.mark.parametrize(("train", "place"), [({"metric": "bleu"}, "metric"), ({"generate": {}}, "generate")])
def test_what_measures_has_to_be_installed(tmp_path, monkeypatch, train, place):
    monkeypatch.setattr(generation, "_LIBRARIES", {"rouge-score": "rouge_score_that_is_not_there"})
    with pytest.raises(SubspanError, match="rouge-score is not installed: pip install rouge-score") as caught:
        Session(spec_of(tmp_path, PAIRS, **train)).plan()
    assert caught.value.path == ("train", place)
