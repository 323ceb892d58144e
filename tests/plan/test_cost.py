"""Costs computed on shapes, against what really is allocated and multiplied."""

from functools import cache

import pytest
import torch
import transformers as hf
from torch.profiler import ProfilerActivity, profile

from rewriter import Rule, example_inputs, plan, rewrite, trace, tuned_parameters
from rewriter.algebra import Dense
from rewriter.plan.cost import change_bound, site_cost, step_cost
from rewriter.tasks import task_of
from rewriter.training.evaluation import objective
from rewriter.training.optimisers import OPTIMISERS
from rewriter.transforms import TRANSFORMS, compose
from tests.architectures import ARCHITECTURES, build
from tests.methods.test_laws import PLAIN, Tensors, chain_of, matrix

SIZES = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 256, "max_position_embeddings": 64}
SMALL = {**SIZES, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {**SMALL, "attention_probs_dropout_prob": 0.0}
LINEARS, LAYERS = "bert.encoder.layer.*.**.{query,key,value,dense}.weight", "bert.encoder.layer.*"
DECODER = "model.layers.*.{self_attn,mlp}.*.weight"
BATCH, LENGTH = 8, 48
ADAMW = OPTIMISERS["adamw"].entries
CASES = [
    ("bert", LINEARS, {"lora": {"rank": 4}}),
    ("bert", LINEARS, {"dora": {"rank": 4}}),
    ("bert", LINEARS, {"pafi": {"density": 0.01}}),
    ("bert", "bert.encoder.**.bias", "bitfit"),
    ("bert", LAYERS, {"hadapter": {"bottleneck": 8}}),
    ("bert", LAYERS, {"prefix": {"length": 8}}),
    ("bert-dropout", LINEARS, {"lora": {"rank": 4}}),
    ("llama", DECODER, {"lora": {"rank": 4}}),
    ("llama", DECODER, "ssb"),
]


def made(name, device):
    torch.manual_seed(0)
    with torch.device(device):
        if name == "llama":
            config = hf.LlamaConfig(**SMALL, num_key_value_heads=2)
            return hf.LlamaForCausalLM._from_config(config), "causal-lm"
        dropout = {"attention_probs_dropout_prob": 0.1} if name == "bert-dropout" else {}
        config = hf.BertConfig(**{**BERT, **dropout})
        return hf.BertForSequenceClassification._from_config(config), "sequence-classification"


@cache
def traced(name, device):
    model, task = made(name, device)
    return (
        trace(model, example_inputs(model, task), keep=True),
        task_of(task).example_batch(model, BATCH, LENGTH),
        task_of(task),
    )


def rewritten(name, device, target, step):
    graph, batch, task = traced(name, device)
    return graph, rewrite(graph, plan(graph, [Rule(target=target, apply=[step])])), batch, objective(task)


def label(case):
    return f"{case[0]}-{case[2] if isinstance(case[2], str) else next(iter(case[2]))}"


@pytest.mark.parametrize(("name", "target", "step"), CASES, ids=map(label, CASES))
def test_memory_is_what_is_allocated(name, target, step):
    """Activations: what is still allocated after a real forward. 15 % are allowed, 7 % are seen (small temporaries)."""
    graph, tuned, batch, loss = rewritten(name, "meta", target, step)
    estimate = step_cost(graph, tuned, batch, loss, ADAMW)
    _, tuned, batch, loss = rewritten(name, "cpu", target, step)
    tuned.train()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        value = loss(tuned, batch)
    allocated = sum(event.self_cpu_memory_usage for event in events.key_averages())
    assert estimate.activations == pytest.approx(allocated, rel=0.15)
    optimiser = torch.optim.AdamW(tuned_parameters(tuned).values())
    value.backward()
    optimiser.step()
    tensors = [t for state in optimiser.state.values() for t in state.values() if t.ndim]
    tensors += [p.grad for p in tuned_parameters(tuned).values()]
    assert estimate.optimiser == sum(t.numel() * t.element_size() for t in tensors)


def test_overhead_by_hand():
    """lora on one linear of n x m at T tokens: 2Tr(n + m) forward, twice that backward, over 2Tnm each."""
    model, inputs = build("bert", meta=True)
    graph = trace(model, inputs, modes=("eval",))
    found = plan(graph, [Rule(target="bert.encoder.layer.0.intermediate.dense.weight", apply=[{"lora": {"rank": 2}}])])
    cost = site_cost(found.sites[0], tokens=30)
    n, m, r = 16, 24, 2
    assert cost.forward == pytest.approx(r * (n + m) / (n * m))
    assert cost.backward == pytest.approx(2 * r * (n + m) / (n * m))
    assert cost.rank == r
    embedding = plan(graph, [Rule(target=ARCHITECTURES["bert"].other, apply=[{"lora": {"rank": 2}}])]).sites[0]
    assert site_cost(embedding, 30).forward is None and site_cost(embedding, 30).rank == 2


def test_overhead_of_a_step():
    """Frozen: forward and input gradient. Tuning the whole of every linear adds its gradient, half as much again."""
    graph, tuned, batch, loss = rewritten("bert", "meta", LINEARS, "full")
    assert 0.3 < step_cost(graph, tuned, batch, loss, ADAMW).overhead < 0.5
    _, tuned, _, _ = rewritten("bert", "meta", LINEARS, {"lora": {"rank": 4}})
    assert 0.0 < step_cost(graph, tuned, batch, loss, ADAMW).overhead < 0.2


BOUNDS = dict.fromkeys(("lora", "trilora", "adalora", "flora", "lora_fa", "lora_xs", "vera", "delora", "tied_lora"), 2)
BOUNDS |= {"miss": 2, "lokr": 2, "spectral": 4, "pissa": 4, "milora": 4, "loha": 4, "pafi": 1}
BOUNDS |= {"adamss": 2, "psoft": 2, "deft": 2, "tinylora": 2, "peanut": 2, "super_tuning": 3}


@pytest.mark.parametrize("name", PLAIN)
def test_the_change_has_no_larger_rank(name):
    base = matrix((9, 7), 3)
    w = Dense(base)
    op = compose(chain_of([name], 2), w, (9, 7), Tensors(base, 0.3), "w")
    bound = change_bound(op, w)
    assert bound == BOUNDS.get(name, 7)
    change = (op.dense() - base).detach()
    assert int(torch.linalg.matrix_rank(change, rtol=1e-9)) <= bound
    two = [*chain_of([name], 2), (TRANSFORMS["lora"], TRANSFORMS["lora"].options(rank=1))]
    assert change_bound(compose(two, w, (9, 7), Tensors(base, 0.3), "w"), w) == min(7, bound + 1)
