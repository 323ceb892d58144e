"""A model on rows: the loss, and what is measured."""

import contextlib
import gc
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..graph.traced import TracedModel
from ..passes.base import Context
from ..passes.manager import run
from ..spec import Spec, Train
from ..tasks import Task
from ..tuned import TunedModel
from .parallel import processes, share, together, total
from .recompute import by_layer
from .schedules import Objective
from .sharding import shard

Rows = Sequence[Any]
Collate = Callable[[list], dict[str, Tensor]]
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def for_training(model: TunedModel, spec: Spec, layers: int = 0, changed: dict[str, int] | None = None) -> None:
    """Make the train graph of a model what steps run: passes for training, and layers that are recomputed. In place.

    Args:
        layers: how many are recomputed where the spec does not say that all are.
        changed: how many nodes each pass changed, counted up.

    Raises:
        SpecError: the graph has no layers to recompute.
    """
    off, on = spec.train.passes.off, spec.train.passes.on
    longest = spec.data.max_length if spec.data else None
    lean = spec.train.memory == "lean"
    context = Context("train", defers=spec.task.defers, device=processes().device.type, longest=longest, lean=lean)
    for_steps(model, context, off, on, changed)
    if spec.train.gradient_checkpointing or layers:
        by_layer(model, None if spec.train.gradient_checkpointing else layers)


def for_steps(
    model: TunedModel,
    context: Context,
    off: Collection[str] = (),
    on: Collection[str] = (),
    changed: dict[str, int] | None = None,
) -> None:
    """Run the passes for training over the train graph of a model. In place; see `for_training`."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    context = replace(context, plan=model.plan, tensors=tensors)
    model.graphs["train"] = run(model.graphs["train"], "train", context, off, on, changed)
    for name, value in context.folded.items():
        model.add(name, value, persistent=False)
    model.recompile()


def objective(task: Task) -> Objective:
    """A function from a traced model and a batch to the task's mean loss on it; the batch is moved to the model."""

    def value(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        inputs, targets = split(model, batch, next(model.parameters()).device)
        return task.loss(model(**inputs), targets) / task.count(targets).clamp(min=1)

    return value


def split(
    model: nn.Module, batch: Mapping[str, Tensor], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's inputs and the targets of a batch, on a device."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    return {name: moved.pop(name) for name in model.input_names}, moved


def autocast(settings: Train, device: torch.device) -> contextlib.AbstractContextManager:
    """The type of the computation that a spec asks for."""
    half = HALVES.get(settings.precision)
    return torch.autocast(device.type, half) if half else contextlib.nullcontext()


def evaluate(model: TunedModel, spec: Spec, rows: Rows, collate: Collate) -> dict[str, float]:
    """The spec's metric of outputs, and the plain mean loss, of a model on rows; the model is left in train mode."""
    return predict(model, spec, rows, collate)[0]


def predict(model: TunedModel, spec: Spec, rows: Rows, collate: Collate) -> tuple[dict[str, float], np.ndarray | None]:
    """`evaluate`, and what the metric needs of the model's outputs: (n, k) float64 in the order of the rows; None
    where the loss is the metric."""
    task, size, device = spec.task, spec.train.batch_size, processes().device
    order = np.arange(len(rows))
    if task.writes:  # Rows of like lengths have little padding.
        order = np.argsort([task.length(row) for row in rows], kind="stable")
    chunks = [order[i : i + size].tolist() for i in range(0, len(rows), size)]
    own, turns = _turns(len(chunks), spec)
    sums, parts = torch.zeros(2, dtype=torch.float64, device=device), []
    # A loader draws a seed; a run that resumes after the evaluation would not have drawn it.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model.eval()
        reads = _read(model, spec)
        loader = DataLoader(rows, batch_sampler=[chunks[i] for i in turns], collate_fn=collate)
        for turn, (number, batch) in enumerate(zip(turns, loader, strict=True)):
            inputs, targets = split(model, batch, device)
            with autocast(spec.train, device):
                out = reads(**inputs)
            summary = task.summary(out, targets).double() if spec.compared != "loss" else None
            both = None if summary is None else task.summed(summary)
            both = torch.stack([task.loss(out, targets), task.count(targets)]).double() if both is None else both
            sums += both if turn < len(own) else 0.0 * both
            if summary is not None and turn < max(len(own), 1):
                parts.append(torch.cat([torch.full_like(summary[:, :1], number), summary], dim=1))
        model.train()
    if not own:  # Of the first batch only the shape of its summary was wanted.
        sums, parts = torch.zeros_like(sums), [part[:0] for part in parts]
    loss, count = total(sums).tolist()
    found = {"loss": loss / count if count else math.nan}
    if spec.compared == "loss":
        return found, None
    every = together(torch.cat(parts)).cpu().numpy()
    every = every[every[:, 0].argsort(kind="stable")][:, 1:]  # Each process had its own batches.
    every = every[order.argsort()] if task.writes else every  # A row of each row.
    return {spec.compared: task.measure(spec.compared, every, rows), **found}, every


@torch.no_grad()
def referred(model: TracedModel, spec: Spec, rows: Dataset, collate: Collate) -> Dataset:
    """Rows with what the task's loss reads of the model before it is tuned, if it reads any.

    Args:
        model: traced, without an adapter; it is left as it was.
    """
    task, size, device = spec.task, spec.train.batch_size, processes().device
    if not task.reference:
        return rows
    used, count = model.clone("eval").requires_grad_(False), spec.train.parallel.shard
    used.recompile()
    if count > 1:
        shard(count, (used,), ())
    used.to(device).eval()
    parts, reads = [torch.zeros(0, len(task.reference) + 1, dtype=torch.float64, device=device)], _read(used, spec)
    own, turns = _turns(-(-len(rows) // size), spec)
    for turn, number in enumerate(turns):
        index = range(number * size, min((number + 1) * size, len(rows)))
        inputs, targets = split(model, collate([rows[i] for i in index]), device)
        with autocast(spec.train, device):
            found = task.refers(reads(**inputs), targets).double()
        if turn < len(own):
            parts.append(torch.cat([torch.tensor([*index], device=device).double()[:, None], found], dim=1))
    del used, reads
    gc.collect()  # What is shared out is held in cycles.
    every = together(torch.cat(parts)).cpu()
    every = every[every[:, 0].argsort()]
    for k, name in enumerate(task.reference, 1):
        rows = rows.add_column(name, every[:, k].tolist())
    return rows


def _turns(count: int, spec: Spec) -> tuple[Sequence[int], list[int]]:
    """Of so many batches those that are this process's, and those that it runs: at least one, and where weights are
    shared out as many as the others do; what is more does not count."""
    own = share(range(count))
    most = -(-count // processes().num_processes) if spec.train.parallel.shard > 1 else max(len(own), min(count, 1))
    return own, [*own, *[0] * (most - len(own))]


def _read(model: TunedModel, spec: Spec) -> TunedModel:
    """A model in eval mode whose logits, where they are over a vocabulary, are computed where they are measured."""
    if not spec.task.defers:
        return model
    other, off = model.clone("eval"), spec.train.passes.off
    context = Context("eval", defers=True, device=processes().device.type)
    other.graphs["eval"] = run(other.graphs["eval"], "train", context, off)
    other.recompile()
    return other
