"""Logits that never exist whole: the same losses and gradients, in float64 to the order of sums."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch import nn

from rewriter import Rule, plan, rewrite, tuned_parameters
from rewriter.graph import deferred
from rewriter.passes.base import Context
from rewriter.passes.fuse.defer_head import defer_head
from rewriter.tasks import Criterion, task_of
from tests.training.test_packing import LINEARS, LORA, SIZES, model_of, traced

pytestmark = pytest.mark.xdist_group("decoders")

LAST = -100
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 97}
HEAD = "lm_head.weight"
CASES = [
    ("llama", SIZES, "causal-lm", LINEARS, LORA),
    ("llama", SIZES, "causal-lm", HEAD, LORA),
    ("llama", SIZES, "causal-lm", HEAD, "full"),
    ("llama", {**SIZES, "tie_word_embeddings": True}, "causal-lm", "model.embed_tokens.weight", LORA),
    ("gemma2", SIZES, "causal-lm", LINEARS, LORA),
    ("cohere", SIZES, "causal-lm", LINEARS, LORA),
    ("granite", {**SIZES, "logits_scaling": 3.0}, "causal-lm", LINEARS, LORA),
    ("gpt2", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}, "causal-lm", "**.c_attn.weight", LORA),
    ("t5", T5, "seq2seq-lm", "**.{q,v}.weight", LORA),
]


def rewritten(kind, sizes, task, target, step):
    task = task_of(task)
    if kind == "t5":
        torch.manual_seed(0)
        model = hf.AutoModelForSeq2SeqLM.from_config(hf.T5Config(**sizes, decoder_start_token_id=0)).double()
    else:
        model = model_of(kind, sizes)
    graph = traced(model, packed=False, task=task.name)
    out = rewrite(graph, plan(graph, [Rule.model_validate({"target": target, "apply": [step]})]))
    for key, p in tuned_parameters(out).items():
        nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(sum(map(ord, key))))
    batch = task.example_batch(model, 3, 11)
    generator = torch.Generator().manual_seed(0)
    for name in batch:
        if name.endswith("ids") or name == "labels":
            batch[name] = torch.randint(3, 97, batch[name].shape, generator=generator)
    batch["labels"][torch.rand(batch["labels"].shape, generator=generator) < 0.4] = LAST
    return out.train(), task, batch


def step_of(model, task, batch, criterion):
    torch.manual_seed(1)
    out = model(**{name: batch[name] for name in model.input_names})
    loss = task.loss(out, batch, criterion) / task.count(batch)
    loss.backward()
    found = {name: p.grad for name, p in tuned_parameters(model).items()}
    model.zero_grad()
    return out.logits, loss.detach(), found


@pytest.mark.parametrize(
    ("kind", "sizes", "task", "target", "step"),
    CASES,
    ids=[f"{c[0]}-{c[3]}-{c[4] if isinstance(c[4], str) else next(iter(c[4]))}" for c in CASES],
)
def test_losses_and_gradients_are_the_same(monkeypatch, kind, sizes, task, target, step):
    model, task, batch = rewritten(kind, sizes, task, target, step)
    plain = [(criterion, *step_of(model, task, batch, criterion)[1:]) for criterion in (Criterion(0.0), Criterion(0.1))]
    model.graphs["train"] = defer_head(model.graphs["train"], Context("train", defers=True))
    model.recompile()
    for rows, (criterion, expected, grads) in itertools.product((1, 7, 10**6), plain):
        monkeypatch.setattr(deferred, "ENTRIES", rows * 97)
        logits, loss, found = step_of(model, task, batch, criterion)
        assert isinstance(logits, deferred.Deferred) and logits.width == 97
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        assert all(one.abs().max() > 0 for one in grads.values())
        for name, one in grads.items():
            torch.testing.assert_close(found[name], one, rtol=1e-9, atol=1e-12)


def test_masked_tokens_are_not_multiplied_and_logits_are_never_whole():
    model, task, batch = rewritten(*CASES[0])
    model.graphs["train"] = defer_head(model.graphs["train"], Context("train", defers=True))
    model.recompile()
    made, seen = model(**{name: batch[name] for name in model.input_names}), []

    def head(hidden, *others):
        seen.append(hidden.shape)
        return made.logits.head(hidden, *others)

    task.loss(SimpleNamespace(logits=replace(made.logits, head=head)), batch)
    assert seen == [(1, int((batch["labels"] != LAST).sum()), 32)]


def test_a_batch_of_which_nothing_is_learnt():
    model, task, batch = rewritten(*CASES[0])
    model.graphs["train"] = defer_head(model.graphs["train"], Context("train", defers=True))
    model.recompile()
    batch["labels"].fill_(LAST)
    loss = task.loss(model(**{name: batch[name] for name in model.input_names}), batch)
    loss.backward()
    assert loss == 0 and all(not p.grad.any() for p in tuned_parameters(model).values())


def test_a_head_whose_logits_are_read_within_the_graph_stays():
    model, *_ = rewritten(*CASES[0])
    graph = model.graphs["train"]
    (logits,) = graph.output_node().all_input_nodes
    with graph.inserting_after(logits):
        graph.call_function(torch.ops.aten.neg.default, (logits,))
    before = len(graph.nodes)
    assert len(defer_head(graph, Context("train", defers=True)).nodes) <= before
    assert graph.output_node().all_input_nodes[0].target is torch.ops.aten.linear.default
