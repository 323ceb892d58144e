"""`torch.compile` of a step: one graph without a break, and none made anew for another length; every method."""

import os

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pipelines.beside import LINEARS
from pipelines.performance import choices, options_of, targets
from rewriter import Rule, SpecError, plan, rewrite, tuned_parameters
from rewriter.passes.base import Context
from rewriter.training.evaluation import for_steps
from rewriter.transforms import TRANSFORMS
from tests.architectures import inputs_of, traced

LENGTHS = (9, 14, 21)
EVERY = 1 if os.environ.get("SUBSPAN_COMPILE_ALL") else 4  # All take three minutes.
METHODS = [name for name, one in TRANSFORMS.items() if one.on != ("cross_attention",)]  # BERT has none.


def gradients(model, batch):
    torch.manual_seed(0)
    loss = model(**batch).logits.square().sum() + sum(model.penalties.values())
    return [loss, *torch.autograd.grad(loss, list(tuned_parameters(model).values()), allow_unused=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "lean"),
    [(name, False) for name in METHODS[::EVERY]] + [(name, True) for name in ("lora", "dora", "hra")],
)
def test_one_graph_for_all_lengths(method, lean):
    _, inputs, graph = traced("bert")
    rows = "embeddings" in TRANSFORMS[method].on
    target = "bert.embeddings" if rows else targets(method, LINEARS, "bert.encoder.layer.*")
    planned = plan(graph, [Rule(target=target, apply=[{method: options_of(method, {}, 2)}])])
    try:
        model = rewrite(graph, planned).train()
    except SpecError:  # What is chosen by data, at random.
        model = rewrite(graph, planned, values=choices(planned)).train()
    for_steps(model, Context("train", lean=lean))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    for length in LENGTHS:
        batch = inputs_of("bert", inputs, 3, length)
        plain = gradients(model, batch)
        torch.manual_seed(0)
        loss = compiled(**batch).logits.square().sum() + sum(model.penalties.values())
        found = torch.autograd.grad(loss, list(tuned_parameters(model).values()), allow_unused=True)
        for one, other in zip([loss, *found], plain, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)
    assert counter.frame_count == 1
