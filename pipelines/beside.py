"""PEFT beside Subspan: the same data, rank, rate and batches. Needs the extras demo and dev."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import optuna
import peft
import torch
import transformers

from pipelines.cells import latest, open_study
from rewriter import Session, SubspanError, TunedModel, load_model, objective, rewrite, trace, tuned_parameters
from rewriter.plan.cost import kept_bytes
from rewriter.session import example_inputs
from rewriter.trace import twin
from rewriter.training.evaluation import for_training

LINEARS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def ours(session: Session) -> float:
    """Accuracy of Subspan."""
    with TemporaryDirectory() as folder:
        return session.tune(Path(folder) / "run")["validation"]["accuracy"]


def theirs(session: Session) -> tuple[float, int, int]:
    """Accuracy of PEFT's method with the options of the first rule; tuned weights, less the head, and all."""
    job, settings = session.prepare(), session.spec.train
    ((method, options),) = session.spec.rules[0].chain
    if method.name == "lora":
        keywords = {"target_modules": LINEARS, "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
        config = peft.LoraConfig(r=options.rank, lora_alpha=options.alpha, **keywords)
    elif method.name == "prompt":
        config = peft.PromptTuningConfig(num_virtual_tokens=options.length, task_type="SEQ_CLS")
    else:
        raise SubspanError(f"{method.name}: only lora and prompt are run with PEFT here")
    total = job.pretrained.model.num_parameters()
    model = peft.get_peft_model(job.pretrained.model, config)
    tuned = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name)
    with TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=folder,
                num_train_epochs=settings.epochs,
                per_device_train_batch_size=settings.batch_size,
                per_device_eval_batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                lr_scheduler_type=settings.schedule,
                warmup_steps=settings.warmup,
                weight_decay=settings.weight_decay,
                max_grad_norm=settings.max_grad_norm,
                use_cpu=not torch.cuda.is_available(),
                seed=settings.seed,
                data_seed=settings.seed,
                label_names=["labels"],
                remove_unused_columns=False,
                report_to="none",
            ),
            train_dataset=job.train,
            eval_dataset=job.validation,
            data_collator=job.collate,
            compute_metrics=lambda out: {"accuracy": float((out.predictions.argmax(-1) == out.label_ids).mean())},
        )
        trainer.train()
        return trainer.evaluate()["eval_accuracy"], tuned, total


def cells(out: Path, spec: str, seeds: list[int]) -> Iterator[tuple[str, float]]:
    """The cells of PEFT on a row's setting with their accuracy; those that the study lacks are run."""
    study = open_study(out)
    for seed in seeds:
        session = Session(spec, f"train.seed={seed}")
        row = f"{session.spec.meta['row']} of PEFT"
        cell = f"{Path(spec.partition('#')[0]).stem}/{row}/{seed}"
        if cell not in latest(study):
            value, tuned, total = theirs(session)
            known = {"trainable_parameters": tuned, "total_parameters": total, "metric": "accuracy"}
            known |= {"cell": cell, "row": row, "seed": seed, "settings": []}
            study.add_trial(optuna.trial.create_trial(value=value, user_attrs=known))
        yield cell, latest(study)[cell].value


@dataclass(frozen=True)
class Step:
    """A decoder's steps by LoRA over PEFT's: tokens per second, fast and lean (medians of interleaved rounds), bytes
    kept for the backward, fast, lean and PEFT's, and the largest difference of a gradient over the largest one."""

    fast: float
    lean: float
    saved: tuple[int, int, int]
    off: float


def step(spec: str | Path, rows: int, length: int, rounds: int) -> Step:
    """Forward, backward and AdamW of a spec with one rule of LoRA, fast, lean and by PEFT, in turns.

    Args:
        rows, length: of the batch, of random tokens, of which all are learnt.
    """
    session = Session(spec)
    ((method, options),) = session.spec.rules[0].chain
    if method.name != "lora" or len(session.spec.rules) > 1:
        raise SubspanError("only a spec of one rule, lora, is run with PEFT here")
    pretrained, task = load_model(session.spec), session.spec.task
    traced = trace(pretrained.module, example_inputs(session.spec, pretrained))
    generator = torch.Generator().manual_seed(0)
    models, values = {}, {}
    for name in ("fast", "lean"):
        model = models[name] = rewrite(traced, session.plan(), session.spec.train.seed).train()
        for key, p in tuned_parameters(model).items():
            p.data.copy_(values.setdefault(key, 0.02 * torch.randn(p.shape, generator=generator)))
        for_training(model, Session(spec, f"train.memory={name}").spec)
    models["peft"] = _peft(twin(pretrained.model), options, values)
    batch = task.example_batch(pretrained.model, rows, length, pretrained.processor)
    ids = torch.randint(0, 1000, (rows, length), generator=generator)
    # Ours are shifted already, transformers shifts them itself.
    batch |= {"input_ids": ids, "labels": torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)}
    ours = objective(task)
    theirs = lambda model, batch: model(**batch | {"labels": ids}, use_cache=False).loss  # noqa: E731
    losses = {"fast": ours, "lean": ours, "peft": theirs}
    grads = {name: _gradients(model, losses[name], batch) for name, model in models.items()}
    most = max(float(one.abs().max()) for one in grads["peft"].values())
    off = max(float((grads[a][key] - one).abs().max()) for a in ("fast", "lean") for key, one in grads["peft"].items())
    saved = tuple(kept_bytes(model, batch, losses[name]) for name, model in models.items())
    times: dict[str, list[float]] = {name: [] for name in models}
    optimisers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        for name, model in models.items()
    }
    for _ in range(rounds):
        for name, model in models.items():
            started = time.perf_counter()
            losses[name](model, batch).backward()
            optimisers[name].step()
            optimisers[name].zero_grad()
            times[name].append(time.perf_counter() - started)
    ratio = lambda name: statistics.median(a / b for a, b in zip(times["peft"], times[name], strict=True))  # noqa: E731
    return Step(ratio("fast"), ratio("lean"), saved, off / most)


def _peft(model: torch.nn.Module, options: object, values: dict[str, torch.Tensor]) -> torch.nn.Module:
    """PEFT's LoRA with the same factors, which it stores transposed."""
    names = sorted({key.removesuffix(".lora.a").removesuffix(".weight") for key in values if key.endswith(".lora.a")})
    config = peft.LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=names, task_type="CAUSAL_LM")
    out = peft.get_peft_model(model, config).train()
    for key, p in _factors(out).items():
        p.data.copy_(values[key].T)
    return out


def _factors(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """PEFT's factors by the names of ours."""
    ends = {".lora_A.default.weight": ".weight.lora.a", ".lora_B.default.weight": ".weight.lora.b"}
    return {
        name.removeprefix("base_model.model.").removesuffix(end) + own: p
        for name, p in model.named_parameters()
        for end, own in ends.items()
        if name.endswith(end)
    }


def _gradients(model: torch.nn.Module, loss: Callable, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    loss(model, batch).backward()
    mine = isinstance(model, TunedModel)
    tuned = tuned_parameters(model) if mine else _factors(model)
    found = {name: p.grad if mine else p.grad.T for name, p in tuned.items()}
    model.zero_grad()
    return found
