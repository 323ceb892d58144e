"""Subspan beside PEFT on one setting: accuracy over seeds, and the cost of a step. Needs the extras demo and dev."""

import resource
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import optuna
import peft
import torch
import transformers
import typer
from rich.table import Table
from torch import nn

from pipelines.console import console, failures
from pipelines.study import Study, latest, open_study
from pipelines.validate import Level, check
from rewriter import Inputs, Rule, Session, SubspanError, plan, rewrite, trace

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
LINEARS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


@app.command()
def accuracy(
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Seeds; by default 0, 1 and 2.")] = None,
    spec: Annotated[Path, typer.Option(help="LoRA on all six linears of a BERT.")] = Path("specs/quickstart.yaml"),
) -> None:
    """Validation accuracy of Subspan and of PEFT, same data, rank, rate and batches, over seeds."""
    with failures():
        table = Table("seed", "Subspan", "PEFT")
        results = []
        for seed in seeds or [0, 1, 2]:
            session = Session(spec, f"train.seed={seed}")
            results.append((ours(session), theirs(session)[0]))
            table.add_row(str(seed), *(f"{value:.4f}" for value in results[-1]))
        table.add_row("mean", *(f"{statistics.mean(column):.4f}" for column in zip(*results, strict=True)))
        console.print(table)


def ours(session: Session) -> float:
    """Accuracy of Subspan."""
    with TemporaryDirectory() as folder:
        return session.tune(Path(folder) / "run")["validation"]["accuracy"]


@app.command()
def beside(
    out: Study,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Seeds; by default 0, 1 and 2.")] = None,
    spec: Annotated[str, typer.Option(help="A row of lora or prompt.")] = "specs/study/rotten_tomatoes.yaml#lora",
) -> None:
    """Put PEFT on a row's setting into a study: cells of one more row, "<row> of PEFT"."""
    with failures(out):
        study = open_study(out)
        for seed in seeds or [0, 1, 2]:
            session = Session(spec, f"train.seed={seed}")
            row = f"{session.spec.meta['row']} of PEFT"
            cell = f"{Path(spec.partition('#')[0]).stem}/{row}/{seed}"
            if cell not in latest(study):
                value, tuned, total = theirs(session)
                known = {"trainable_parameters": tuned, "total_parameters": total, "metric": "accuracy"}
                known |= {"cell": cell, "row": row, "seed": seed, "settings": []}
                study.add_trial(optuna.trial.create_trial(value=value, user_attrs=known))
            console.print(f"{cell}: {latest(study)[cell].value:.4f}", highlight=False)


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


@app.command()
def validate() -> None:
    """Seconds to check a RoBERTa-large row's plan and an 8-billion decoder to its train graph, and the peak memory."""
    with failures():
        table = Table("spec", "level", "seconds", "peak memory, MB")
        for spec, level in (("specs/paper/roberta-large.yaml#10", Level.plan), ("specs/llama-8b.yaml", Level.trace)):
            started = time.perf_counter()
            check(Session(spec), level)
            seconds = time.perf_counter() - started
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
            table.add_row(spec, str(level), f"{seconds:.1f}", f"{peak:,.0f}")
        console.print(table)


@app.command()
def step(
    method: Annotated[str, typer.Option(help="lora or dora.")] = "lora",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.")] = 15,
) -> None:
    """Time and saved memory of a step (BERT, hidden 768, 4 layers, batch 8 x 64, rank 8) over the frozen model's.

    The floor is forward and backward of the frozen model down to the first layer's input, nothing inserted.
    """
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
    times: dict[str, list[float]] = {name: [] for name in models}
    saved = {name: saved_bytes(one, batch) for name, one in models.items()}
    for _ in range(rounds):
        for name, one in models.items():
            started = time.perf_counter()
            one(**batch).logits.sum().backward()
            times[name].append(time.perf_counter() - started)
    table = Table("model", "step / floor", "saved for backward, MB", "tuned parameters")
    for name, one in models.items():
        ratio = statistics.median(a / b for a, b in zip(times[name], times["floor"], strict=True))
        tuned = sum(p.numel() for p in one.parameters() if p.requires_grad)
        table.add_row(name, f"{ratio:.2f}", f"{saved[name] / 1e6:.0f}", f"{tuned:,}")
    console.print(table)


def saved_bytes(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of activations that autograd keeps for the backward; parameters and buffers apart, shared storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(**batch).logits.sum()
    out.backward()
    return sum(kept.values())


if __name__ == "__main__":
    app()
