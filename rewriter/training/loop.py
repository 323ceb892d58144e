"""The loop: batches, steps, evaluations, checkpoints, from the first step to the measured model.

Every process has the whole model and its share of each batch; gradients are summed, so that the number of processes
does not change the result.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import SpecError
from ..spec import Spec, Train, decisive
from ..tasks import Criterion, Task
from ..tasks.base import WRITTEN
from ..tuned import TunedModel, tuned_parameters
from . import checkpoint
from .checkpoint import Progress, Tuning, save_predictions
from .evaluation import Collate, Rows, autocast, for_training, objective, predict, split
from .generation import Asked, generate
from .memory import return_large_blocks
from .optimisers import PLATEAU, make_optimiser, make_schedule
from .packing import Packed, collate_packed
from .parallel import processes, share, sum_gradients, total
from .reports import Interrupted, Report, Stop, signals
from .schedules import Budget, settle


@dataclass
class Run:
    """A run in progress.

    Attributes:
        spec, task: what is tuned for what.
        train, collate, lengths: the training rows (packed, lists of them), how they become a batch, and their tokens if
            batches go by them.
        plain: how rows that are not packed become a batch.
        tuning: the model with its optimiser, schedules and scaler.
        tuned: the parameters that are tuned.
        criterion: the training loss.
        device: where the model is.
        per_epoch, steps, every: optimiser steps of an epoch, of the whole run, and between evaluations.
        progress: how far it is.
        evaluations: steps with their metric, turned so that less is better; what is no number is the worst.
        sums: of the losses since the last entry of the log, on the device.
        finite: whether every loss was, on the device.
        norm: of the last gradient.
        asked: whether a signal asked any process to stop.
        predictions: the step of the last evaluation, and what it found.
        questions: what answers are written to, if any are.
        first: a batch for a process that has no rows of its own, where all run equally often.
    """

    spec: Spec
    train: Rows
    collate: Collate
    lengths: list[int] | None
    plain: Collate
    tuning: Tuning
    tuned: list[nn.Parameter]
    criterion: Criterion
    device: torch.device
    per_epoch: int
    steps: int
    every: int
    progress: Progress
    evaluations: list[tuple[int, float]]
    sums: dict[str, Tensor]
    finite: Tensor
    norm: Tensor | float = 0.0
    asked: bool = False
    predictions: tuple[int, np.ndarray | None] = (-1, None)
    questions: Asked | None = None
    first: dict[str, Tensor] | None = None

    @property
    def task(self) -> Task:
        return self.spec.task

    @property
    def best(self) -> int | None:
        """The step of the best evaluation so far."""
        return min(self.evaluations, key=lambda one: one[1])[0] if self.evaluations else None

    @property
    def over(self) -> bool:
        """Whether all steps are done, or the last `patience` evaluations were no better than one before them."""
        patience, best = self.spec.train.patience, self.best
        worse = sum(step > best for step, _ in self.evaluations)
        return self.progress.step >= self.steps or (patience is not None and worse >= patience)


def _turned(spec: Spec, value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value if spec.task.lower(spec.metric) else -value


def _written(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry as JSON has it: what is no finite number is null."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in entry.items()}


def tune(
    model: TunedModel,
    spec: Spec,
    train: Rows,
    validation: Rows,
    collate: Collate,
    folder: Path,
    resume: bool = False,
    weights: Tensor | None = None,
    tied: Mapping[str, str] | None = None,
    questions: Asked | None = None,
    layers: int = 0,
) -> tuple[TunedModel, dict[str, dict[str, Any]]]:
    """Tune a rewritten model, settle what its budgets left, and measure it.

    `log.jsonl`, `checkpoints/` and `predictions.safetensors` are written into `folder`. On Ctrl-C or SIGTERM the step
    in progress ends and a checkpoint is written; a second Ctrl-C stops at once.

    Args:
        model: from `rewrite`.
        spec: its `train` section, task and metric are read.
        train, validation: rows for `collate`.
        collate: rows -> a batch: inputs of the model by name, and targets.
        folder: must exist.
        resume: continue from the newest checkpoint in `folder`, if there is one.
        weights: (labels,) weight of each label's terms in the training loss, for a spec with `class_weights`.
        tied: what else a run can't go on without, name -> digest: a checkpoint with another one is refused.
        questions: what answers are written to, for a spec that says so.
        layers: how many are recomputed in the backward, from the first on, where the spec does not say that all are.

    Returns:
        The tuned model (another one where a budget took something away), and
        {"validation": {metric: value, "loss": value, "rows"}, "train": {"loss", "steps", "epochs", "seconds", "rows"},
        "evaluations": {"kept": step, "best": step, "value": metric of the best}, "before": what was measured before the
        first step}; where answers are written, their measures are of "validation" too, and "generated" has {"rows",
        "samples"}.

    Raises:
        SpecError: the loss is not finite; half precision where the hardware has none; a batch that can't be shared out.
        Interrupted: stopped by a signal.
    """
    places, started = folder / "checkpoints", time.perf_counter()
    last = checkpoint.checkpoints(places)[-1:] if resume else []
    graph = model.graphs["train"]
    run = _begin(model, spec, train, collate, weights, tied or {}, last[0] if last else None, layers)
    run.questions = questions
    before = run.progress.seconds
    with signals() as stop, Report(spec, folder, run.steps, run.progress.history) as report:
        if spec.train.evaluate_start and run.progress.step == 0:
            _measure(run, report, validation)
        for batches in _batches(run):
            _step(run, batches, stop)
            _tell(run, report)
            _measure(run, report, validation)
            run.progress.seconds = before + time.perf_counter() - started
            _keep(run, places)
    run.progress.seconds = before + time.perf_counter() - started
    model.graphs["train"] = graph
    model.recompile()
    return _end(run, validation, places)


def _begin(
    model: TunedModel,
    spec: Spec,
    train: Rows,
    collate: Collate,
    weights: Tensor | None,
    tied: Mapping[str, str],
    last: Path | None,
    layers: int = 0,
) -> Run:
    if spec.train.memory == "lean":
        return_large_blocks()
    settings, task, device = spec.train, spec.task, device_of(spec)
    if settings.class_weights is not None and weights is None:
        raise SpecError("the weights of the labels are not given: see `label_weights`", ("train", "class_weights"))
    torch.manual_seed(settings.seed + processes().process_index)
    for_training(model, spec, layers)
    model.to(device).train()
    lengths = [task.length(row) for row in train] if settings.group_by_length or settings.packing else None
    budget, plain = Budget(model, train, collate, objective(task), settings.seed), collate
    if settings.packing:
        train, collate, lengths = Packed(train, lengths, spec.data.max_length), collate_packed, None
    per_epoch, steps = _per_epoch(settings, len(train)), steps_of(spec, len(train))
    optimiser = make_optimiser(model, settings)
    schedule = make_schedule(settings, optimiser, steps, task.lower(spec.metric))
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
    tuning = Tuning(model, optimiser, schedule, scaler, budget, decisive(spec), tied)
    progress, name = checkpoint.load(tuning, last) if last else Progress(), f"eval_{spec.metric}"
    return Run(
        spec,
        train,
        collate,
        lengths,
        plain,
        tuning,
        list(tuned_parameters(model).values()),
        Criterion(settings.label_smoothing, weights),
        device,
        per_epoch,
        steps,
        settings.evaluate_steps or per_epoch,
        progress,
        [(one["step"], _turned(spec, one[name])) for one in progress.history if name in one and one["step"]],
        {key: torch.tensor(value, dtype=torch.float64, device=device) for key, value in progress.losses.items()},
        torch.tensor(True, device=device),
        first=collate([train[0]]) if settings.parallel.shard > 1 else None,
    )


def _per_epoch(settings: Train, rows: int) -> int:
    return math.ceil(math.ceil(rows / settings.batch_size) / settings.gradient_accumulation)


def steps_of(spec: Spec, rows: int) -> int:
    """The optimiser steps of a run on so many training rows (packed ones count as the rows they are packed into)."""
    return spec.train.max_steps or math.ceil(spec.train.epochs * _per_epoch(spec.train, rows))


def device_of(spec: Spec) -> torch.device:
    """Where to tune.

    Raises:
        SpecError: the hardware can't compute in that precision, or the processes can't share a batch.
    """
    state, settings = processes(), spec.train
    if settings.precision == "float16" and state.device.type != "cuda":
        raise SpecError("float16 needs CUDA; use bfloat16 or float32", ("train", "precision"))
    if settings.batch_size % state.num_processes:
        said = f"{state.num_processes} processes can't share {settings.batch_size} rows equally"
        raise SpecError(said, ("train", "batch_size"))
    if settings.batch_size < (least := spec.task.least(spec.columns) * state.num_processes):
        said = f"{state.num_processes} processes need {least} rows to learn from, at least"
        raise SpecError(said, ("train", "batch_size"))
    parallel, count = settings.parallel, state.num_processes
    if count % parallel.shard or parallel.data not in (None, count // parallel.shard):
        groups = "groups" if parallel.data is None else f"{parallel.data} groups"
        said = f"{count} processes are not {groups} of {parallel.shard}"
        raise SpecError(said, ("train", "parallel", "shard"))
    return state.device


def _batches(run: Run) -> Iterator[list[dict[str, Tensor] | None]]:
    """The batches of every step that is left: this process's shares, None where it has none."""
    size, accumulated = run.spec.train.batch_size, run.spec.train.gradient_accumulation
    while not run.over:
        epoch, done = divmod(run.progress.step, run.per_epoch)
        order = _order(run, epoch)
        shares = [share(order[i : i + size]) for i in range(0, len(order), size)][done * accumulated :]
        # A loader draws a seed when an epoch begins: a run that goes on within an epoch has drawn it already.
        if done == 0:
            _go_on(run)
        own = [rows for rows in shares if rows]
        pin = run.device.type == "cuda"
        loader = iter(DataLoader(run.train, batch_sampler=own, collate_fn=run.collate, pin_memory=pin))
        _go_on(run)
        for i in range(0, len(shares), accumulated):
            yield [next(loader) if rows else None for rows in shares[i : i + accumulated]]
            if run.over:
                return


def _go_on(run: Run) -> None:
    """Set the generators as they were when the checkpoint was written, once."""
    if run.progress.random is not None:
        checkpoint.set_random(run.progress.random)
        run.progress.random = None


def _order(run: Run, epoch: int) -> list[int]:
    """The rows of an epoch: the seed and its number decide."""
    generator = torch.Generator().manual_seed(run.spec.train.seed + epoch)
    if run.lengths is None:
        return torch.randperm(len(run.train), generator=generator).tolist()
    from transformers.trainer_pt_utils import get_length_grouped_indices

    return get_length_grouped_indices(run.lengths, run.spec.train.batch_size, generator=generator)


def _step(run: Run, batches: list[dict[str, Tensor] | None], stop: Stop) -> None:
    """One optimiser step on the mean loss of the batches of all processes."""
    tuning, settings, task, progress = run.tuning, run.spec.train, run.task, run.progress
    model, own = tuning.model, [batch for batch in batches if batch is not None]
    counts = [task.count(split(model, batch, torch.device("cpu"))[1], run.criterion) for batch in own]
    masks = [mask for batch in own if (mask := batch.get("attention_mask")) is not None]
    cells, padded = sum(mask.numel() for mask in masks), sum(int((mask == 0).sum()) for mask in masks)
    known = [float(sum(counts)), len(own), stop.asked, cells, padded]
    if many := processes().num_processes > 1:
        known = total(torch.tensor(known, dtype=torch.float64).to(run.device)).tolist()
    count, parts, asked, cells, padded = known
    value, count = torch.zeros((), device=run.device), count or 1.0  # Rows without a label have nothing to learn from.
    for name in model.penalty_names:
        _add(run, f"penalty_{name}", value)
    # Where weights are shared out every process runs as often as the others: without rows, on some that do not count.
    shared = settings.parallel.shard > 1
    for batch in batches if shared else own:
        inputs, targets = split(model, batch or run.first, run.device)
        with autocast(settings, run.device):
            out = model(**inputs)
        if batch is None:
            tuning.scaler.scale(0.0 * task.loss(out, targets, run.criterion)).backward()
            continue
        loss = task.loss(out, targets, run.criterion) / count
        for name, penalty in model.penalties.items():
            loss = loss + penalty / parts
            _add(run, f"penalty_{name}", penalty.detach() / parts)
        tuning.scaler.scale(loss).backward()
        value = value + loss.detach()
    _add(run, "loss", value)
    if cells:
        _add(run, "padding", torch.tensor(padded / cells / processes().num_processes, device=run.device))
    run.finite &= torch.isfinite(value)
    sum_gradients(run.tuned)
    tuning.scaler.unscale_(tuning.optimiser)
    run.norm = nn.utils.clip_grad_norm_(run.tuned, settings.max_grad_norm or math.inf)
    tuning.budget.before_step()
    scale = tuning.scaler.get_scale()
    tuning.scaler.step(tuning.optimiser)
    tuning.scaler.update()
    if tuning.scaler.get_scale() >= scale and settings.schedule != PLATEAU:  # A smaller scale: the step was left out.
        tuning.schedule.step()
    tuning.optimiser.zero_grad()
    progress.step, progress.since = progress.step + 1, progress.since + 1
    tuning.budget.after_step(progress.step, run.steps, tuning.optimiser)
    run.asked = bool(asked) if many else stop.asked


def _add(run: Run, name: str, value: Tensor) -> None:
    run.sums[name] = run.sums.get(name, 0) + value.double()


def _tell(run: Run, report: Report) -> None:
    """The step before the user, and every `log_steps` an entry of the log."""
    progress = run.progress
    report.step(progress.step)
    if progress.step % run.spec.train.log_steps == 0:
        _check_finite(run)
        entry = {name: float(total(value)) / progress.since for name, value in sorted(run.sums.items())}
        rate = run.tuning.schedule.get_last_lr()[0]
        _enter(run, report, {**entry, "grad_norm": float(run.norm), "learning_rate": rate})
        run.sums, progress.since = {}, 0


def _enter(run: Run, report: Report, entry: dict[str, Any]) -> None:
    step = run.progress.step
    entry = _written(entry | {"epoch": step / run.per_epoch, "step": step})
    run.progress.history.append(entry)
    report.write(entry)


def _check_finite(run: Run) -> None:
    """Raises SpecError if any loss since the start was infinite or not a number. Waits for the device."""
    if float(total((~run.finite).double())):
        said = f"the loss is not finite (noticed at step {run.progress.step}); lower the rate, or warm up"
        raise SpecError(said, ("train", "learning_rate"))


def _measure(run: Run, report: Report, validation: Rows) -> None:
    """An evaluation, where it is time for one, and answers, where it is time for those."""
    step, found, more = run.progress.step, {}, {}
    due = lambda every: step % every == 0 or step == run.steps  # noqa: E731
    if due(run.every):
        _check_finite(run)
        found, predictions = predict(run.tuning.model, run.spec, validation, run.plain)
        run.predictions = step, predictions
    if run.questions is not None and due(run.spec.writing.steps or run.every):
        _check_finite(run)
        written, samples = generate(run.tuning.model, run.spec, run.questions)
        found, more = found | written, {"samples": samples}
    if found:
        _enter(run, report, {f"eval_{name}": value for name, value in found.items()} | more)
    if step and (value := found.get(run.spec.metric)) is not None:
        run.evaluations.append((step, _turned(run.spec, value)))
        if run.spec.train.schedule == PLATEAU:
            run.tuning.schedule.step(value)


def _keep(run: Run, places: Path) -> None:
    """A checkpoint, where it is time for one.

    Raises:
        Interrupted: a signal asked to stop.
    """
    settings, progress = run.spec.train, run.progress
    best = run.best if settings.keep == "best" else None
    if progress.step % settings.checkpoint_steps == 0 or run.asked or progress.step in (best, run.steps):
        _check_finite(run)
        progress.losses = {name: float(total(value)) for name, value in sorted(run.sums.items())}
        checkpoint.save(run.tuning, progress, places, settings.checkpoint_keep, best)
    if run.asked:
        said = f"stopped at step {progress.step} of {run.steps}"
        raise Interrupted(f"{said}; a checkpoint is written, --resume goes on from it")


def _end(run: Run, validation: Rows, places: Path) -> tuple[TunedModel, dict[str, dict[str, Any]]]:
    """The model that is kept, settled and measured."""
    _check_finite(run)
    spec, progress, tuning = run.spec, run.progress, run.tuning
    best = run.best
    kept = best if spec.train.keep == "best" and best is not None else progress.step
    if kept != progress.step:
        checkpoint.load_weights(tuning, checkpoint.place_of(places, kept))
    settled = settle(tuning.model, tuning.budget)
    entries = [entry for entry in progress.history if entry["step"] == kept and settled is tuning.model]
    measured = next((entry for entry in entries if "eval_loss" in entry), None)
    step, predictions = run.predictions
    if measured is None or (step != kept and spec.compared != "loss"):
        found, predictions = predict(settled, spec, validation, run.plain)
    if measured is not None:
        found = {name: measured[f"eval_{name}"] for name in dict.fromkeys((spec.compared, "loss"))}
    more, generated = _answers(run, settled, entries)
    found = more | found
    if predictions is not None and processes().is_main_process:
        save_predictions(predictions, places.parent)
    losses = [entry["loss"] for entry in progress.history if "loss" in entry]
    first = next((entry for entry in progress.history if entry["step"] == 0), {})
    before = {name.removeprefix("eval_"): value for name, value in first.items() if name.startswith("eval_")}
    rest = float(total(run.sums["loss"])) / progress.since if progress.since else None
    return settled, {
        "validation": {**_written(found), "rows": len(validation)},
        "train": {
            "loss": losses[-1] if losses else rest,
            "steps": progress.step,
            "epochs": progress.step / run.per_epoch,
            "seconds": round(progress.seconds, 2),
            "rows": len(run.train.rows) if isinstance(run.train, Packed) else len(run.train),
        },
        "evaluations": {"kept": kept, "best": best, "value": _value(run, best)},
        **({"before": before} if before else {}),
        **generated,
    }


def _answers(
    run: Run, model: TunedModel, entries: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, float], dict[str, Any]]:
    """The measures of what the kept state writes, and the count of its rows with samples.

    Args:
        entries: of the log, of that state.
    """
    if run.questions is None:
        return {}, {}
    entry = next((one for one in entries if "samples" in one), None)
    if entry is None:
        found, samples = generate(model, run.spec, run.questions)
    else:
        found, samples = {name: entry[f"eval_{name}"] for name in (*WRITTEN, "stopped")}, entry["samples"]
    return found, {"generated": {"rows": len(run.questions.questions), "samples": samples}}


def _value(run: Run, step: int | None) -> float | None:
    """The metric as it was evaluated at a step."""
    name = f"eval_{run.spec.metric}"
    return next((entry[name] for entry in run.progress.history if name in entry and entry["step"] == step), None)


def label_weights(spec: Spec, labels: Sequence[str], counts: Sequence[int]) -> Tensor | None:
    """The weights of `train.class_weights`, (labels,) float64; None where a spec has none.

    `balanced` is n / (k c) for a label that stands in c of n places, of k labels.

    Args:
        counts: how often each label stands in the training rows.

    Raises:
        SpecError: a weight for no label, a label without a weight, or a label that no row has.
    """
    given = spec.train.class_weights
    path = ("train", "class_weights")
    if given is None:
        return None
    if given == "balanced":
        if not all(counts):
            raise SpecError(f"no training row has the label {labels[list(counts).index(0)]}", path)
        return torch.tensor([sum(counts) / (len(counts) * count) for count in counts], dtype=torch.float64)
    if odd := sorted(given.keys() - set(labels)):
        raise SpecError(f"{odd[0]!r} is none of the labels {', '.join(labels)}", (*path, odd[0]), at_key=True)
    if left := [label for label in labels if label not in given]:
        raise SpecError(f"the label {left[0]} has no weight", path)
    return torch.tensor([given[label] for label in labels], dtype=torch.float64)
