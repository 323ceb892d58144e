"""Tune a model as a spec says: spec -> trace -> plan -> rewrite -> tune -> adapter."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from datasets import Dataset
from torch import Tensor

from pipelines.console import Settings, Transforms, Without, console, failures, located, overrides
from pipelines.folder import check_folder, claimed, clear
from rewriter import (
    Inputs,
    Plan,
    Pretrained,
    Spec,
    TracedModel,
    TunedModel,
    allocate,
    collator,
    dump_spec,
    encode,
    example_inputs,
    load_model,
    load_processor,
    load_rows,
    load_spec,
    plan,
    print_plan,
    print_summary,
    rewrite,
    save_adapter,
    trace,
    tune,
)
from rewriter.data import check_length
from rewriter.errors import raise_all
from rewriter.files import write_json, write_text
from rewriter.passes.manager import check_names
from rewriter.plan.cost import StepCost, exceeded, step_cost
from rewriter.pretrained import example_batch, positions
from rewriter.training.tune import objective, resumed_choices
from rewriter.transforms import Schedule


def train(
    spec: Annotated[Path, typer.Argument(help="The spec (YAML).", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the run; made new.", show_default=False)],
    settings: Settings = None,
    without: Without = None,
    transforms: Transforms = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its newest checkpoint.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="First delete the run that is in --out.")] = False,
) -> None:
    """Tune a model and write the run folder: spec.yaml, plan.json, metrics.json, log.jsonl, checkpoints/, adapter/.

    Ctrl-C ends the step in progress, writes a checkpoint and stops; --resume goes on to the same result.
    """
    with failures(out):
        loaded = load_spec(spec, overrides(settings, without))
        with located(loaded):
            run(loaded, out, resume, overwrite)


_TRACED: dict[str, tuple[bool, TracedModel, Pretrained]] = {}


def model_key(spec: Spec) -> str:
    """Equal for specs whose models trace alike."""
    return f"{spec.model.model_dump_json()} {spec.train.seed} {spec.train.passes.off}"


def plan_of(spec: Spec, whole: bool = False) -> tuple[Plan, TracedModel, Pretrained]:
    """The plan of a spec, the traced model and the model, on the meta device: no weight is read.

    Specs of one model that follow each other trace it once.

    Args:
        whole: trace the train graph too, and with dynamic shapes, as a run does; a plan alone needs neither.
    """
    passes = spec.train.passes
    check_names(passes.off, passes.on)
    key = model_key(spec)
    if key not in _TRACED or (whole and not _TRACED[key][0]):
        pretrained = load_model(spec, meta=True)
        inputs = example_inputs(pretrained.model, spec.model.task)
        if not whole:
            inputs = Inputs(kwargs=inputs.kwargs)
        _TRACED.clear()
        traced = trace(pretrained.model, inputs, ("train", "eval") if whole else ("eval",), passes.off)
        _TRACED[key] = whole, traced, pretrained
    _, traced, pretrained = _TRACED[key]
    planned = plan(traced, spec.rules, pretrained.new, spec.strict)
    check_length(spec, positions(pretrained.model), planned.rows)
    raise_all(exceeded(spec.limits, planned))
    return planned, traced, pretrained


def tokens_of(spec: Spec) -> int:
    """Rows that a linear op reads per step: tokens of text, or about as many patches of images."""
    return spec.train.batch_size * (spec.data.max_length if spec.data else 128)


def step_of(spec: Spec, planned: Plan, traced: TracedModel, pretrained: Pretrained) -> StepCost:
    """The cost of a step of a spec, from its train graph on the meta device; all else is from `plan_of`, whole.

    Raises:
        SpecError: it exceeds a limit of the spec.
    """
    length = spec.data.max_length if spec.data else 128
    batch = example_batch(pretrained.model, spec.model.task, spec.train.batch_size, length)
    cost = step_cost(traced, rewritten(spec, traced, planned), batch, objective(spec.model.task))
    raise_all(exceeded(spec.limits, planned, cost))
    return cost


def rewritten(spec: Spec, traced: TracedModel, planned: Plan, chosen: dict[str, Tensor] | None = None) -> TunedModel:
    """`rewrite` with a spec's seed and passes."""
    passes = spec.train.passes
    return rewrite(traced, planned, spec.train.seed, chosen, passes.off, passes.on)


@dataclass
class Job:
    """What tuning needs: the model with its weights, encoded rows, and how they become batches."""

    pretrained: Pretrained
    inputs: Inputs
    train: Dataset
    validation: Dataset
    collate: Callable[[list], dict[str, Tensor]]


def prepare(spec: Spec) -> Job:
    """Load the model and the data of a spec."""
    processor, pretrained = load_processor(spec), load_model(spec)
    rows = load_rows(spec, pretrained.labels)
    train, validation = (encode(spec, part, processor, pretrained.labels) for part in (rows.train, rows.validation))
    inputs = example_inputs(pretrained.model, spec.model.task)
    start = getattr(pretrained.model.config, "decoder_start_token_id", None)
    return Job(pretrained, inputs, train, validation, collator(processor, list(inputs.kwargs), start))


def run(spec: Spec, out: Path, resume: bool, overwrite: bool) -> None:
    """Tune into the folder `out`."""
    check_folder(spec, out, resume, overwrite)
    found = plan_of(spec, whole=spec.limits.of_a_step)
    print_plan(found[0], console, tokens_of(spec), step_of(spec, *found) if spec.limits.of_a_step else None)
    job = prepare(spec)
    traced = trace(job.pretrained.model, job.inputs, without=spec.train.passes.off)
    planned, chosen = choose(spec, job, traced, found[0], out if resume else None)
    model = rewritten(spec, traced, planned, chosen)

    if overwrite:
        clear(out)
    with claimed(out):
        write_text(out / "spec.yaml", dump_spec(spec))
        write_json(out / "plan.json", planned.to_dict())
        model, metrics = tune(model, spec, job.train, job.validation, job.collate, out, resume)
        save_adapter(model, out / "adapter", spec, metrics)
        write_json(out / "plan.json", model.plan.to_dict())
        write_json(out / "metrics.json", metrics)
    facts = {
        f"validation {spec.metric}": f"{metrics['validation'][spec.metric]:.4f}",
        "adapter": out / "adapter",
        "export it": " ".join(["python pipelines/export.py", str(out), *_files(model.plan)]),
    }
    print_summary("tuned", facts, console)


def _files(planned: Plan) -> list[str]:
    """Options that name the files which a plan's transforms come from."""
    found = {one.origin.package for rule in planned.rules for one, _ in rule.chain if one.origin and one.origin.is_file}
    return [f"--transforms {name}" for name in sorted(found)]


def choose(
    spec: Spec, job: Job, traced: TracedModel, planned: Plan, resumed: Path | None
) -> tuple[Plan, dict[str, Tensor]]:
    """What schedules choose by the training data, or what the run to resume chose."""
    if resumed and (choices := resumed_choices(resumed / "checkpoints")) is not None:
        given, chosen = choices
        if given is None:
            # A checkpoint of a version that kept the sizes in plan.json alone.
            choosing = {
                name
                for site in planned.sites
                for name, one in site.schedules
                if type(one).choose is not Schedule.choose
            }
            sites = json.loads((resumed / "plan.json").read_text(encoding="utf-8"))["sites"]
            given = {step: sizes for site in sites for step, sizes in site["settled"].items() if step in choosing}
        return plan(traced, spec.rules, job.pretrained.new, spec.strict, given), chosen
    return allocate(traced, planned, job.train, job.collate, objective(spec.model.task))


if __name__ == "__main__":
    typer.run(train)
