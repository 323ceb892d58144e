"""Steps of a decoder side by side: packed and padded, logits in chunks and whole, layers kept and computed again."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from rewriter import Session, TunedModel, load_model, objective, rewrite, trace, tuned_parameters
from rewriter.plan.cost import kept_bytes
from rewriter.session import example_inputs
from rewriter.training.evaluation import for_training
from rewriter.training.memory import return_large_blocks
from rewriter.training.packing import Packed, collate_packed
from rewriter.training.recompute import by_layer

_PEAK = "from pipelines.steps import peak; import sys; print(peak(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])))"


@dataclass(frozen=True)
class Found:
    """What was found of packing: tokens per second packed over padded, tokens of a slot that are of a row, packed and
    padded, and by how much the mean loss of all rows differs."""

    times: float
    filled: tuple[float, float]
    off: float


def packing(spec: str | Path, rows: int, *overrides: str) -> Found:
    """Tune on the first rows of a spec, once in padded batches in random order and once packed, step by step in turns.

    Each step has its gradients; the weights stay as they are, so that losses can be compared.
    """
    models, job = {}, None
    for name in ("padded", "packed"):
        packed = f"train.packing={str(name == 'packed').lower()}"
        session = Session(spec, *overrides, packed, "train.group_by_length=false")
        job = session.prepare() if job is None else job
        inputs = example_inputs(session.spec, job.pretrained)
        models[name] = rewrite(trace(job.pretrained.module, inputs), session.plan(), session.spec.train.seed).train()
        for_training(models[name], session.spec)
    size, generator = session.spec.train.batch_size, torch.Generator().manual_seed(0)
    order = torch.randperm(len(job.train), generator=generator)
    some = [job.train[i] for i in order[:rows].tolist()]
    packs = Packed(some, [len(row["input_ids"]) for row in some], session.spec.data.max_length)
    batches = {
        "padded": [job.collate(some[i : i + size]) for i in range(0, len(some), size)],
        "packed": [collate_packed([packs[i] for i in part]) for part in torch.arange(len(packs)).split(size)],
    }
    times, sums, slots = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0), {}
    loss, task = objective(session.spec.task), session.spec.task
    for name, step in _in_turns(batches):
        started = time.perf_counter()
        value = loss(models[name], step)
        value.backward()
        times[name] += time.perf_counter() - started
        sums[name] += value.item() * task.count(step).item()
        slots[name] = slots.get(name, 0) + step["input_ids"].numel()
    count = sum(task.count(step).item() for step in batches["padded"])
    whole = sum(len(row["input_ids"]) for row in some)
    off = abs(sums["packed"] - sums["padded"]) / count
    return Found(times["padded"] / times["packed"], (whole / slots["packed"], whole / slots["padded"]), off)


def _in_turns(batches: dict[str, list]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The steps of both, so that at any time about the same share of each is done."""
    steps = [(i / len(own), name, step) for name, own in batches.items() for i, step in enumerate(own)]
    yield from ((name, step) for _, name, step in sorted(steps, key=lambda one: one[0]))


def head(spec: str | Path, rows: int, length: int, rounds: int) -> tuple[float, float, float]:
    """A step with logits in chunks over the one with them whole: its time (the median of interleaved rounds), its peak
    memory above the loaded model's, and the largest difference of a gradient over the largest gradient.

    Args:
        rows, length: of the batch, of random tokens, of which all are learnt.
        rounds: of the times.
    """
    models, batch, times, grads = {}, None, {}, {}
    for name in ("whole", "chunks"):
        models[name], batch = _model(spec, name, rows, length)
        times[name] = []
    for _ in range(rounds):
        for name, (model, loss) in models.items():
            started = time.perf_counter()
            loss(model, batch).backward()
            times[name].append(time.perf_counter() - started)
            grads[name] = torch.cat([p.grad.flatten() for p in tuned_parameters(model).values()])
            model.zero_grad()
    off = float((grads["chunks"] - grads["whole"]).abs().max() / grads["whole"].abs().max())
    peaks = []
    for name in ("chunks", "whole"):
        line = [sys.executable, "-c", _PEAK, str(spec), name, str(rows), str(length)]
        peaks.append(int(subprocess.run(line, check=True, capture_output=True, text=True).stdout.split()[-1]))
    ratio = statistics.median(a / b for a, b in zip(times["chunks"], times["whole"], strict=True))
    return ratio, peaks[0] / peaks[1], off


def _model(spec: str | Path, name: str, rows: int, length: int) -> tuple[tuple[TunedModel, object], dict]:
    off = "[defer_head]" if name == "whole" else "[]"
    session = Session(spec, f"train.passes={{off: {off}}}", "train.packing=false")
    pretrained = load_model(session.spec)
    inputs = example_inputs(session.spec, pretrained)
    model = rewrite(trace(pretrained.module, inputs), session.plan(), session.spec.train.seed).train()
    generator = torch.Generator().manual_seed(0)
    for p in tuned_parameters(model).values():
        torch.nn.init.normal_(p, std=0.02, generator=generator)
    for_training(model, session.spec)
    batch = session.spec.task.example_batch(pretrained.model, rows, length, pretrained.processor)
    known = pretrained.model.config.get_text_config().vocab_size
    for key in ("input_ids", "labels"):
        batch[key] = torch.randint(0, min(1000, known), batch[key].shape, generator=generator)
    return (model, objective(session.spec.task)), batch


def peak(spec: str, name: str, rows: int, length: int) -> int:
    """Bytes of a step's peak above what is held before it, in this process."""
    return_large_blocks()
    (model, loss), batch = _model(spec, name, rows, length)
    return peak_of(lambda: loss(model, batch).backward())


def peak_of(step: Callable[[], object]) -> int:
    """Bytes of the process's peak in a step above what it holds before it; Linux alone."""
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts anew.
    held = _status("VmRSS")
    step()
    return _status("VmHWM") - held


@dataclass(frozen=True)
class Recomputed:
    """A step whose activations are limited to half of what it saves: bytes that the plain step saves, as planned; that
    the limited one saves, as planned and as measured; its layers that are computed again; the FLOPs that it adds to the
    plain step's, as a share of the frozen model's; and whether loss and gradients are the plain step's bits."""

    plain: int
    planned: int
    measured: int
    layers: int
    added: float
    same: bool


def recompute(spec: str | Path, rows: int, length: int) -> Recomputed:
    """A step beside the one whose activations are limited to half.

    Args:
        rows, length: of the batch, of random tokens, of which all are learnt.
    """
    sizes = (f"train.batch_size={rows}", f"data.max_length={length}")
    plain = Session(spec, *sizes).cost()
    limited = Session(spec, *sizes, f"limits.activation_memory={plain.activations // 2}").cost()
    (model, loss), batch = _model(spec, "chunks", rows, length)
    found = [_gradients(model, loss, batch)]
    by_layer(model, limited.layers)
    found.append(_gradients(model, loss, batch))
    same = all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    added = limited.overhead - plain.overhead
    kept = kept_bytes(model, batch, loss)
    return Recomputed(plain.activations, limited.activations, kept, limited.layers, added, same)


def _gradients(
    model: TunedModel, loss: Callable[..., torch.Tensor], batch: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    value = loss(model, batch)
    value.backward()
    found = [value.detach(), *(p.grad.clone() for p in tuned_parameters(model).values())]
    model.zero_grad()
    return found


def _status(key: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])
