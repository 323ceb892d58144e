"""Tuning on `transformers.Trainer`: losses and metrics per task, checkpoints of the tuned tensors alone, no pickle."""

import contextlib
import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from sklearn import metrics as sk
from torch import Tensor
from torch.utils.data import Dataset

from ..adapters.store import check_origins, origins
from ..data import IGNORED
from ..errors import SpecError, SubspanError
from ..files import aside, load_into, load_tensors, remove, save_tensors
from ..spec import Spec
from ..tuned import TunedModel, tuned_parameters
from .schedules import NOW, Budget, Objective, Sizes, settle

TUNED, OPTIMISER, BUDGET, STATE, TRAINER_STATE = (
    "tuned.safetensors",
    "optimizer.safetensors",
    "budget.safetensors",
    "state.json",
    "trainer_state.json",
)


class Interrupted(SubspanError):
    """Tuning was stopped by a signal; a checkpoint holds everything up to there. `status` is a shell's for that."""

    status = 130


def loss(task: str, logits: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Mean cross entropy over the labels that are not ignored; mean squared error for regression.

    Args:
        logits: (batch, classes), (batch, sequence, classes), or (batch, 1) for regression.
        labels: (batch,) or (batch, sequence), -100 where ignored.
        count: divide by this instead (labels in all batches of one optimiser step).
    """
    reduction = "mean" if count is None else "sum"
    if task == "regression":
        value = F.mse_loss(logits.squeeze(-1).float(), labels.float(), reduction=reduction)
    else:
        value = F.cross_entropy(
            logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction=reduction
        )
    return value if count is None else value / count


def objective(task: str) -> Objective:
    """A function from a model and a batch to the task's loss on it; the batch is moved to the model."""

    def value(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        device = next(model.parameters()).device
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = inputs.pop("labels")
        return loss(task, model(**inputs).logits, labels)

    return value


def summary(task: str, logits: Tensor, labels: Tensor) -> Tensor:
    """What metrics need of one batch, small: (batch, 1) predictions, (batch, sequence) for tags, or for language models
    (batch, 3): sum of the negative log-likelihoods, tokens, correct tokens."""
    if task == "regression":
        return logits.float()
    if not task.endswith("-lm"):
        return logits.argmax(-1, keepdim=task != "token-classification")
    kept = labels != IGNORED
    nll = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    right = (logits.argmax(-1) == labels) & kept
    return torch.stack([nll.double().sum(1), kept.sum(1), right.sum(1)], dim=1)


def measure(spec: Spec, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metric of a spec from `summary`'s predictions of a whole data set."""
    name, task = spec.metric, spec.model.task
    if task.endswith("-lm"):
        nll, tokens, right = predictions.sum(0)
        value = {"perplexity": math.exp(min(nll / tokens, 700.0)), "accuracy": right / tokens, "loss": nll / tokens}[
            name
        ]
    elif name == "loss":
        return {}
    elif task == "regression":
        guess = predictions[:, 0]
        value = sk.mean_squared_error(labels, guess) if name == "mse" else np.corrcoef(labels, guess)[0, 1]
    else:
        kept = labels != IGNORED
        truth, guess = labels[kept], (predictions[..., 0] if labels.ndim == 1 else predictions)[kept]
        average = "binary" if len(set(truth.tolist()) | set(guess.tolist()) | {0, 1}) == 2 else "macro"
        value = {
            "accuracy": lambda: sk.accuracy_score(truth, guess),
            "f1": lambda: sk.f1_score(truth, guess, average=average, zero_division=0),
            "matthews_correlation": lambda: sk.matthews_corrcoef(truth, guess),
        }[name]()
    return {name: float(value)}


class _Progress(transformers.TrainerCallback):
    """log.jsonl, the check for a finite loss, the budgets, and a checkpoint on Ctrl-C."""

    budget: Budget

    def __init__(self, log: Path):
        self.log, self.signalled, self.finite = log, False, True

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.budget.before_step()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.budget.after_step(state.global_step + 1, state.max_steps, getattr(optimizer, "optimizer", optimizer))

    def on_train_begin(self, args, state, control, **kwargs):
        self.log.write_text("".join(json.dumps(entry) + "\n" for entry in state.log_history), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.check(state)
        with self.log.open("a", encoding="utf-8") as out:
            out.write(json.dumps(state.log_history[-1]) + "\n")

    def on_step_end(self, args, state, control, **kwargs):
        if self.signalled:
            control.should_save = control.should_training_stop = True

    def check(self, state: transformers.TrainerState) -> None:
        """Raises SpecError if any loss since the start was infinite or not a number. Waits for the device."""
        if not bool(self.finite):
            reason = f"the loss is not finite (noticed at step {state.global_step}); lower the rate, or warm up"
            raise SpecError(reason, ("train", "learning_rate"))


class _Tuner(transformers.Trainer):
    """A Trainer whose checkpoints hold the tuned tensors and the optimiser's state, as safetensors and JSON."""

    progress: _Progress

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sums: dict[str, Tensor | int] = {}

    def create_optimizer(self, *args, **kwargs):
        """The Trainer's optimiser, with groups of their own for tensors whose learning rate differs."""
        optimiser = super().create_optimizer(*args, **kwargs)
        rates = {leaf.name: leaf.rate for site in self.model.plan.sites for leaf in site.leaves}
        rate_of = {id(p): rates[name] for name, p in tuned_parameters(self.model).items()}
        optimiser.param_groups[:] = [
            {**group, "params": members, "lr": rate * group["lr"]}
            for group in optimiser.param_groups
            for rate in sorted(set(rate_of.values()))
            if (members := [p for p in group["params"] if rate_of[id(p)] == rate])
        ]
        return optimiser

    def training_step(self, *args, **kwargs):
        value = super().training_step(*args, **kwargs)
        self.progress.finite &= torch.isfinite(value.detach())
        return value

    def evaluate(self, *args, **kwargs):
        # A data loader draws a seed; a run that resumes after the evaluation would not have drawn it.
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def penalised(self, value: Tensor) -> Tensor:
        """A batch's loss with the model's penalties, each a mean over the batches of one optimiser step."""
        for name, penalty in self.model.penalties.items():
            value = value + penalty / self.current_gradient_accumulation_steps
            self.sums[name] = self.sums.get(name, 0) + penalty.detach()
        if self.model.penalties:
            self.sums["batches"] = self.sums.get("batches", 0) + 1
        return value

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and (count := self.sums.pop("batches", 0)):
            logs |= {f"penalty_{name}": float(value) / count for name, value in self.sums.items()}
            self.sums = {}
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        if not self.args.should_save:
            return
        self.progress.check(self.state)
        root = Path(self.args.output_dir)
        root.mkdir(parents=True, exist_ok=True)
        with aside(root / f"checkpoint-{self.state.global_step}") as (place,):
            place.mkdir()
            save_tensors(tuned_parameters(self.model), place / TUNED)
            save_tensors(_flat_optimiser(self.optimizer), place / OPTIMISER)
            save_tensors(self.progress.budget.state(), place / BUDGET)
            random = {"cpu": torch.get_rng_state()} | (
                {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
            )
            scaler = self.accelerator.scaler
            state = {
                "random": {device: bytes(value.tolist()).hex() for device, value in random.items()},
                "scheduler": self.lr_scheduler.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
                "given": self.model.plan.given,
                "transforms": origins(self.model.plan),
            }
            (place / STATE).write_text(json.dumps(state))
            self.state.stateful_callbacks = {}
            self.state.save_to_json(str(place / TRAINER_STATE))
        for old in checkpoints(root)[: -self.args.save_total_limit]:
            remove(old)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_into(tuned_parameters(self.model), Path(resume_from_checkpoint) / TUNED)
        self.progress.budget.load(load_tensors(Path(resume_from_checkpoint) / BUDGET))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        flat = load_tensors(folder / OPTIMISER)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in flat.items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.lr_scheduler.load_state_dict(self._extra(folder)["scheduler"])
        # The scheduler's own state has the rates; the optimiser's groups were made anew.
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_scaler(self, checkpoint):
        if checkpoint is not None and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(self._extra(Path(checkpoint))["scaler"])

    def _load_rng_state(self, checkpoint):
        if checkpoint is None:
            return
        random = self._extra(Path(checkpoint))["random"]
        torch.set_rng_state(torch.tensor(list(bytes.fromhex(random["cpu"])), dtype=torch.uint8))
        if torch.cuda.is_available() and "cuda" in random:
            torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(random["cuda"])), dtype=torch.uint8))

    @staticmethod
    def _extra(folder: Path) -> dict[str, Any]:
        return json.loads((folder / STATE).read_text())


def _flat_optimiser(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimiser.state_dict()["state"]
    return {f"{index}.{key}": torch.as_tensor(value) for index, entry in state.items() for key, value in entry.items()}


def resumed_choices(folder: Path) -> tuple[Sizes | None, dict[str, Tensor]] | None:
    """What schedules had chosen when the newest checkpoint in a folder was written; None without a checkpoint.

    Returns:
        The sizes by name of the transform (None: the checkpoint is of a version that did not keep them), and the chosen
        tensors by leaf.

    Raises:
        SubspanError: it was written with other transforms than there are here.
    """
    last = checkpoints(folder)[-1:]
    if not last:
        return None
    state = load_tensors(last[0] / BUDGET)
    written = json.loads((last[0] / STATE).read_text(encoding="utf-8"))
    check_origins(last[0] / STATE, written.get("transforms", {}))
    return written.get("given"), {name.removesuffix(NOW): value for name, value in state.items() if name.endswith(NOW)}


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def training_arguments(spec: Spec, folder: Path) -> transformers.TrainingArguments:
    """A spec's `train` section for a Trainer that writes checkpoints into `folder`.

    Raises:
        SpecError: half precision where the hardware has none.
    """
    settings, cuda = spec.train, torch.cuda.is_available()
    if settings.precision == "float16" and not cuda:
        raise SpecError("float16 needs CUDA; use bfloat16 or float32", ("train", "precision"))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bfloat16",
        fp16=settings.precision == "float16",
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,
        eval_strategy="epoch" if settings.epochs > 1 else "no",
        save_strategy="steps",
        save_steps=settings.checkpoint_steps,
        save_total_limit=settings.checkpoint_keep,
        seed=settings.seed,
        data_seed=settings.seed,
        label_names=["labels"],
        remove_unused_columns=False,
        report_to="none",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # DataParallel copies modules by their attributes; a graph has more.
    return arguments


def tune(
    model: TunedModel,
    spec: Spec,
    train: Dataset,
    validation: Dataset,
    collate: Callable[[list], dict[str, Tensor]],
    folder: Path,
    resume: bool = False,
) -> tuple[TunedModel, dict[str, dict[str, float]]]:
    """Tune a rewritten model, settle what its budgets left, and measure it.

    `log.jsonl` and `checkpoints/` are written into `folder`.

    On Ctrl-C or SIGTERM the step in progress ends and a checkpoint is written; a second Ctrl-C stops at once.

    Args:
        model: from `rewrite`; its output has `logits`.
        spec: its `train` section, task and metric are read.
        train, validation: rows for `collate`.
        collate: rows -> inputs of the model by name, and `labels`.
        folder: must exist.
        resume: continue from the newest checkpoint in `folder`, if there is one.

    Returns:
        The tuned model (another one where a budget took something away), and
        {"validation": {metric: value, "loss": value, "rows"}, "train": {"loss", "steps", "epochs", "seconds", "rows"}}.

    Raises:
        SpecError: the loss is not finite; half precision where the hardware has none.
        Interrupted: stopped by a signal.
    """
    progress = _Progress(folder / "log.jsonl")
    tuner = _tuner(model, spec, train, validation, collate, folder, [progress])
    tuner.progress = progress
    progress.budget = Budget(model, train, collate, objective(spec.model.task), spec.train.seed)
    last = checkpoints(folder / "checkpoints")[-1:] if resume else []
    with _signals(progress), _closed_bars(tuner):
        result = tuner.train(resume_from_checkpoint=str(last[0]) if last else None)
        progress.check(tuner.state)
        if progress.signalled:
            step, steps = tuner.state.global_step, tuner.state.max_steps
            raise Interrupted(f"stopped at step {step} of {steps}; a checkpoint is written, resume goes on from it")
    history = tuner.state.log_history
    settled = settle(model, progress.budget)
    measured = [entry for entry in history if "eval_loss" in entry and entry["step"] == tuner.state.global_step]
    if settled is not model or not measured:
        measured = [_tuner(settled, spec, train, validation, collate, folder, []).evaluate()]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return settled, {
        "validation": {name: measured[-1][f"eval_{name}"] for name in dict.fromkeys((spec.metric, "loss"))}
        | {"rows": len(validation)},
        "train": {
            "loss": losses[-1] if losses else result.training_loss,
            "steps": tuner.state.global_step,
            "epochs": tuner.state.epoch,
            "seconds": round(result.metrics["train_runtime"], 2),
            "rows": len(train),
        },
    }


def _tuner(
    model: TunedModel,
    spec: Spec,
    train: Dataset,
    validation: Dataset,
    collate: Callable[[list], dict[str, Tensor]],
    folder: Path,
    callbacks: list[transformers.TrainerCallback],
) -> _Tuner:
    task = spec.model.task
    tuner = _Tuner(
        model=model,
        args=training_arguments(spec, folder / "checkpoints"),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collate,
        compute_loss_func=lambda out, labels, num_items_in_batch=None: tuner.penalised(
            loss(task, out.logits, labels, num_items_in_batch)
        ),
        preprocess_logits_for_metrics=lambda out, labels: summary(
            task, out[0] if isinstance(out, tuple) else out, labels
        ),
        compute_metrics=lambda out: measure(spec, out.predictions, out.label_ids),
        callbacks=callbacks,
    )
    tuner.model_accepts_loss_kwargs = False  # `forward(**kwargs)` looks as if it did.
    return tuner


@contextlib.contextmanager
def _closed_bars(tuner: transformers.Trainer) -> Iterator[None]:
    """End the lines of progress bars, so that an error message starts on its own."""
    try:
        yield
    finally:
        for callback in tuner.callback_handler.callbacks:
            if (bar := getattr(callback, "training_bar", None)) is not None:
                bar.close()


@contextlib.contextmanager
def _signals(progress: _Progress) -> Iterator[None]:
    def stop(number, frame):
        if progress.signalled:
            raise KeyboardInterrupt
        progress.signalled = True
        print("\nstopping after this step; once more stops at once", flush=True)

    try:
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # Only the main thread may handle signals.
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
