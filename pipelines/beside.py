"""PEFT beside Subspan: the same data, rank, rate and batches. Needs the extras demo and dev."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import optuna
import peft
import torch
import transformers

from pipelines.cells import latest, open_study
from rewriter import Session, SubspanError

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
