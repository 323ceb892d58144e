"""Pairs of answers: the losses against their definitions and TRL's, and which tokens are an answer's."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
import typer
from typer.testing import CliRunner

from pipelines.data import data
from rewriter import Session, SubspanError, task_of
from rewriter.answer import answerer, rows_of
from rewriter.graph.deferred import Deferred
from rewriter.tasks import Criterion, Reading
from tests.tiny import make_tokenizer

TRL = Path(os.environ.get("SUBSPAN_TRL", "nowhere"))
TEMPLATE = (
    "{% for m in messages %}[CLS] {{ m.content }} [SEP]{% endfor %}{% if add_generation_prompt %}[CLS] {% endif %}"
)
LOSSES = ["dpo", "orpo"]
VOCABULARY, PAIRS, LENGTH = 7, 3, 6


def batch_of(seed=0):
    """Logits of 3 pairs, labels of which 2 to 6 of a row are learnt, and log-probabilities of a reference."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2 * PAIRS, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (2 * PAIRS, LENGTH), generator=generator)
    for row in range(2 * PAIRS):
        labels[row, : row % 3] = -100
    reference = -10 * torch.rand(2 * PAIRS, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), {"labels": labels, "reference": reference}


def logps_of(logits, labels):
    every = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    kept = labels != -100
    return (every * kept).sum(1), kept.sum(1)


def defined(loss, beta, logits, targets, eps=0.0):
    """Rafailov et al., eq. 7, with Mitchell's label smoothing; Hong et al., eqs. 6 and 7: one pair after the other."""
    (logps, count), total = logps_of(logits, targets["labels"]), 0
    for i in range(PAIRS):
        j = PAIRS + i
        if loss == "dpo":
            ahead = (logps[i] - targets["reference"][i]) - (logps[j] - targets["reference"][j])
            total = total - (1 - eps) * torch.sigmoid(beta * ahead).log() - eps * torch.sigmoid(-beta * ahead).log()
        else:
            one, other = (logps[k] / count[k] for k in (i, j))
            odds = (one.exp() / (1 - one.exp())) / (other.exp() / (1 - other.exp()))
            total = total - one - beta * (odds / (1 + odds)).log()
    return total


def both(value, tensor):
    return value.detach(), torch.autograd.grad(value, tensor)[0]


@pytest.mark.parametrize("eps", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_losses_are_those_of_their_papers(loss, beta, eps):
    task = task_of("preference", {"loss": loss, "beta": beta})
    if eps and not task.smooths:
        pytest.skip("odds ratios have no smoothing")
    logits, targets = batch_of()
    found = task.loss(SimpleNamespace(logits=logits), targets, Criterion(eps))
    assert task.count(targets) == PAIRS
    for own, expected in zip(both(found, logits), both(defined(loss, beta, logits, targets, eps), logits), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_logits_that_are_not_computed_yet_have_the_same_loss_and_gradients(loss, monkeypatch):
    """In chunks of two rows."""
    monkeypatch.setattr("rewriter.graph.deferred.ENTRIES", 2 * VOCABULARY)
    task, (_, targets) = task_of("preference", {"loss": loss}), batch_of()
    hidden = torch.randn(2 * PAIRS, LENGTH, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, 4, dtype=torch.float64, requires_grad=True)
    later = Deferred(lambda rows, w: F.linear(rows, w), hidden, (weight,), VOCABULARY, None)
    own, plain = (task.loss(SimpleNamespace(logits=one), targets) for one in (later, F.linear(hidden, weight)))
    torch.testing.assert_close(own, plain.to(own.dtype))
    for found, expected in zip(*(torch.autograd.grad(one, (hidden, weight)) for one in (own, plain)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)  # The linear part is summed in float32.
    with torch.no_grad():
        torch.testing.assert_close(
            task.summary(SimpleNamespace(logits=later), targets),
            task.summary(SimpleNamespace(logits=F.linear(hidden, weight)), targets),
        )


@pytest.mark.parametrize("loss", LOSSES)
def test_batches_add_up(loss):
    task, (logits, targets) = task_of("preference", {"loss": loss}), batch_of()
    parts = 0
    for i in range(PAIRS):
        rows = [i, PAIRS + i]
        part = {name: value[rows] for name, value in targets.items()}
        parts = parts + task.loss(SimpleNamespace(logits=logits[rows]), part)
    torch.testing.assert_close(parts, task.loss(SimpleNamespace(logits=logits), targets))


def test_measures():
    task, (logits, targets) = task_of("preference", {"beta": 0.5}), batch_of()
    found = task.summary(SimpleNamespace(logits=logits), targets).detach()
    logps = logps_of(logits, targets["labels"])[0] - targets["reference"]
    ahead = (0.5 * (logps[:PAIRS] - logps[PAIRS:])).tolist()
    assert task.measure("margin", found.numpy(), None) == pytest.approx(sum(ahead) / PAIRS)
    assert task.measure("accuracy", found.numpy(), None) == pytest.approx(sum(one > 0 for one in ahead) / PAIRS)
    torch.testing.assert_close(
        task.summed(found),
        torch.stack([task.loss(SimpleNamespace(logits=logits), targets), torch.tensor(3.0)]).detach(),
    )


# What is read.


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


ASKED, GOOD, BAD = "the film was", "good and fine", "bad"
WAYS = {
    "texts": {"prompt": f"{ASKED} ", "chosen": GOOD, "rejected": BAD},
    "chats": {"chosen": [user(ASKED), says(GOOD)], "rejected": [user(ASKED), says(BAD)]},
    "turns": {"messages": [user(ASKED)], "chosen": [says(GOOD)], "rejected": [says(BAD)]},
    "longer": {
        "chosen": [user("a plot"), says("fine"), user(ASKED), says(GOOD)],
        "rejected": [user("a plot"), says("fine"), user(ASKED), says(BAD)],
    },
}


def tokenizer():
    found = make_tokenizer()
    found.chat_template = TEMPLATE
    return found


def read(row, length=64):
    processor, given = tokenizer(), datasets.Dataset.from_list([row])
    reading = Reading({name: name for name in row}, given.features, processor, [], length)
    return processor, task_of("preference").encode(given, reading, [])


@pytest.mark.parametrize("way", WAYS)
def test_what_is_learnt_is_the_answer_and_its_end(way):
    """Of a chat the last turn alone, though the assistant has spoken before."""
    processor, found = read(WAYS[way])
    for side, answer in (("chosen", GOOD), ("rejected", BAD)):
        ids, labels = found[0][f"{side}_input_ids"], found[0][f"{side}_labels"]
        assert [label for label in labels if label != -100] == [
            *processor(answer, add_special_tokens=False)["input_ids"], processor.eos_token_id
        ]  # fmt: skip
        assert all(label in (-100, following) for label, following in zip(labels, ids[1:], strict=False))
        assert labels[-1] == -100 and len(ids) == len(labels)


def test_pairs_without_an_answer_are_left_out_and_cut_ones_keep_what_is_read():
    _, whole = read(WAYS["texts"])
    _, cut = read(WAYS["texts"], length=len(whole[0]["chosen_input_ids"]) - 1)
    assert cut[0]["chosen_labels"] == [*whole[0]["chosen_labels"][:-2], -100]
    assert cut[0]["rejected_labels"] == whole[0]["rejected_labels"]
    for way in WAYS:
        assert len(read(WAYS[way] | {"rejected": WAYS[way]["chosen"]})[1]) == 0


def test_the_answer_of_a_template_that_does_not_say_where_it_begins_is_refused():
    given = datasets.Dataset.from_list([WAYS["chats"]])
    processor = tokenizer()
    processor.chat_template = TEMPLATE.replace("%}[CLS] {% endif", "%}[UNK] [UNK] {% endif")
    reading = Reading({name: name for name in WAYS["chats"]}, given.features, processor, [], 64)
    with pytest.raises(SubspanError, match="which tokens are the answer's is not known"):
        task_of("preference").encode(given, reading, [])


# Whole runs.

LLAMA = {
    "vocab_size": 96, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 3,
}  # fmt: skip
SPEC = """\
version: 1
model: {{name: {folder}/model, task: preference, task_options: {{loss: {loss}}}}}
data: {{format: json, files: {folder}/data.json, columns: {columns}, split: {{validation: 8, seed: 0}}, max_length: 16}}
rules: [{{target: "model.layers.*.self_attn.*_proj.weight", apply: [{{lora: {{rank: 4}}}}]}}]
train: {{epochs: 4, batch_size: 8, learning_rate: 1.0e-2, evaluate_start: true, max_grad_norm: 0}}
"""


def written(folder, way="texts", loss="dpo", more=""):
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    other = json.loads(json.dumps(WAYS[way]).replace(GOOD, "great").replace(BAD, "awful plot"))
    (folder / "data.json").write_text("\n".join(json.dumps(row) for row in [WAYS[way], other] * 16))
    columns = json.dumps({name: name for name in WAYS[way]})
    (folder / "spec.yaml").write_text(SPEC.format(folder=folder, loss=loss, columns=columns) + more)
    return folder / "spec.yaml"


TURNS = pytest.param("turns", "dpo", marks=pytest.mark.slow)


@pytest.mark.parametrize(("way", "loss"), [("texts", "dpo"), ("chats", "orpo"), TURNS])
def test_a_run_learns_and_ships_what_it_learnt(tmp_path, way, loss):
    session = Session(written(tmp_path, way, loss))
    assert session.cost().activations > 0
    metrics = session.tune(tmp_path / "run")
    report = session.export()
    if loss == "dpo":  # It is its own reference before the first step.
        assert metrics["before"]["loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert metrics["validation"]["accuracy"] == 1.0 and metrics["validation"]["loss"] < metrics["before"]["loss"]
    assert report["metrics"]["onnx"]["loss"] == pytest.approx(metrics["validation"]["loss"], rel=1e-5)
    (row,) = rows_of(session.spec, [ASKED])
    assert answerer(session.spec, tmp_path / "run", "merged", tokens=1)(row) == answerer(
        session.spec, tmp_path / "run", "onnx", tokens=1
    )(row)


@pytest.mark.parametrize(
    ("way", "setting", "said"),
    [
        ("texts", "data.loss=all", "the answers are what is learnt"),
        ("texts", "data.long=split", "a pair is not split"),
        ("texts", "data.template='{{x}}'", "it is for turns"),
        ("texts", "train.packing=true", "no use for it"),
        ("texts", "train.generate={}", "no answer"),
        ("texts", "model.task_options.beta=0", "greater than 0"),
    ],
)
def test_what_a_spec_may_not_say(tmp_path, way, setting, said):
    with pytest.raises(SubspanError, match=said):
        Session(written(tmp_path, way), setting)


@pytest.mark.parametrize("way", ["texts", "turns"])
def test_pairs_are_shown_with_what_is_learnt(tmp_path, way):
    app = typer.Typer()
    app.command()(data)
    told = CliRunner().invoke(app, [str(written(tmp_path, way)), "--rows", "1"])
    assert told.exit_code == 0, told.output
    assert "1 of 24, chosen" in told.output and "1 of 24, rejected" in told.output
    assert told.output.count("⟦") == 2 and "48 rows" in told.output


def test_columns_that_do_not_go_together_are_refused(tmp_path):
    spec = written(tmp_path)
    spec.write_text(spec.read_text().replace('"prompt": "prompt", ', ""))
    with pytest.raises(SubspanError, match="'chosen': no list as JSON"):
        Session(spec).check_data()


@pytest.mark.skipif(not (TRL / "trl").is_dir(), reason="SUBSPAN_TRL names no folder with TRL in it")
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_trl_s_on_equal_tensors(tmp_path, loss, monkeypatch):
    """ORPO's likelihood is TRL's where every token is an answer's and rows are of one length: TRL takes it over the
    prompt too, and over all tokens of a batch together."""
    monkeypatch.syspath_prepend(str(TRL))
    torch.manual_seed(0)
    policy, base = (hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)).eval() for _ in range(2))
    ids = torch.randint(4, 16, (2 * PAIRS, 9))
    mask = torch.zeros_like(ids)
    mask[:, 1 if loss == "orpo" else 4 :] = 1
    labels = F.pad(torch.where(mask[:, 1:] == 1, ids[:, 1:], -100), (0, 1), value=-100)
    task = task_of("preference", {"loss": loss})
    with torch.no_grad():
        reference = task.refers(base(ids), {"labels": labels}).T.flatten()
    logits = policy(ids).logits
    own = task.loss(SimpleNamespace(logits=logits), {"labels": labels, "reference": reference}) / PAIRS
    theirs = _trl(loss, tmp_path, policy, base, ids, mask)
    torch.testing.assert_close(own.float(), theirs)  # TRL computes in float32.
    weights = list(policy.parameters())
    for found, expected in zip(*(torch.autograd.grad(one, weights) for one in (own, theirs)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def _trl(loss, folder, policy, base, ids, mask):
    processor, rows = tokenizer(), datasets.Dataset.from_list([WAYS["texts"]] * 2)
    how = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "beta": 0.1, "bf16": False}
    if loss == "dpo":
        from trl import DPOConfig, DPOTrainer

        trainer = DPOTrainer(
            policy,
            ref_model=base,
            args=DPOConfig(**how, disable_dropout=True),
            train_dataset=rows,
            processing_class=processor,
        )
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
        return trainer.compute_loss(policy, given)
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = ORPOTrainer(policy, args=ORPOConfig(**how), train_dataset=rows, processing_class=processor)
    labels, given = torch.where(mask == 1, ids, -100), {}
    for side, part in (("chosen", slice(None, PAIRS)), ("rejected", slice(PAIRS, None))):
        given |= {
            f"{side}_input_ids": ids[part],
            f"{side}_attention_mask": torch.ones_like(ids[part]),
            f"{side}_labels": labels[part],
        }
    return trainer.get_batch_loss_metrics(policy, given)[0]
