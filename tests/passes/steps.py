"""A training step of a rewritten model before and after a pass for training."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rewriter import Rule, plan, rewrite, tuned_parameters
from tests.training.test_packing import LORA, SIZES, model_of, traced

GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}
ROWS, LENGTH = 3, 11


class Step(NamedTuple):
    """A loss, the gradients of the tuned parameters, and the bytes that are kept for the backward."""

    loss: Tensor
    grads: dict[str, Tensor]
    kept: int


def decoder(kind, **options):
    return model_of(kind, GPT2 if kind == "gpt2" else {**SIZES, **options})


def rewritten(model, task, target):
    """A model with LoRA at a target, moved away from its start, and a batch of random tokens."""
    graph = traced(model, packed=False, task=task.name)
    out = rewrite(graph, plan(graph, [Rule.model_validate({"target": target, "apply": [LORA]})]))
    for p in tuned_parameters(out).values():
        nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    batch = task.example_batch(model, ROWS, LENGTH)
    for name in batch:
        if name.endswith("ids") or name == "labels":
            batch[name] = torch.randint(3, 97, batch[name].shape, generator=torch.Generator().manual_seed(0))
    return out.train(), batch


def padded(batch):
    """The batch with a row that is padded on the right, where nothing is learnt."""
    batch["attention_mask"][1, 7:], batch["labels"][1, 6:] = 0, -100
    return batch


def step(model, task, batch):
    kept, own = {}, {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task.loss(model(**{name: batch[name] for name in model.input_names}), batch)
    loss.backward()
    found = {name: p.grad for name, p in tuned_parameters(model).items()}
    model.zero_grad()
    return Step(loss.detach(), found, sum(size for size, _ in kept.values()))


def before_and_after(function, context, model, task, batch):
    """A step before a pass and after it, on a graph that is well formed."""
    before = step(model, task, batch)
    model.graphs["train"] = function(model.graphs["train"], context)
    model.graphs["train"].lint()
    model.recompile()
    return before, step(model, task, batch)


def same_gradients(one, other, limit):
    """Equal up to a share of the largest entry, or of 1: sums are taken in another order."""
    for name, grad in one.grads.items():
        assert (grad - other.grads[name]).abs().max() <= limit * grad.abs().max().clamp(min=1), name
