"""PEFT beside Subspan: the same data, rank, rate and batches. Needs the extras demo and dev."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import optuna
import peft
import torch
import transformers
from torch import nn

from pipelines.cells import latest, open_study
from rewriter import Inputs, Rule, Session, SubspanError, plan, rewrite, trace

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


def models_of(method: str) -> tuple[dict[str, nn.Module], dict[str, torch.Tensor]]:
    """The frozen model, PEFT's and ours (BERT, hidden 768, 4 layers, rank 8), and a batch of 8 x 64 tokens."""
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    make = lambda: transformers.BertForSequenceClassification._from_config(config).train()  # noqa: E731
    ids = torch.randint(1000, (8, 64))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    floor = make().requires_grad_(False)
    floor.bert.embeddings.LayerNorm.requires_grad_(True)
    theirs = peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, use_dora=method == "dora")
    model = make()
    traced = trace(model, Inputs(kwargs=batch, dynamic={name: {0: "batch", 1: "sequence"} for name in batch}))
    target = "bert.encoder.layer.*.{attention.self.{query,key,value},**.dense}.weight"
    rule = Rule(target=target, apply=[{method: {"rank": 8, "alpha": 16}}])
    models = {
        "floor": floor,
        "PEFT": peft.get_peft_model(make(), theirs),
        "Subspan": rewrite(traced, plan(traced, [rule])).train(),
    }
    return models, batch
