"""The main job: a spec in, then its plan, its cost, a tuned run, and what is shipped; each is one call.

Mistakes leave with the spec's file, line and column.
"""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from datasets import Dataset
from torch import Tensor

from .adapters.store import check_tied, save_adapter
from .adapters.ties import fingerprint
from .algebra import held_bytes
from .data import Rows, check_length, encode, load_rows, questions_of, short_enough, tie, unseen
from .errors import SpecError, SubspanError, raise_all
from .files import write_json, write_text
from .folder import LOCK, MARKER, check_folder, claimed, clear, spec_of
from .gguf import files_of, location_of
from .graph.traced import Inputs, TracedModel
from .passes.base import Context
from .passes.manager import check_names
from .passes.manager import run as run_passes
from .plan import Plan, plan
from .plan.cost import StepCost, exceeded, saved_bytes, step_cost
from .pretrained import Pretrained, check_missing, collator, has_processor, load_model, positions, processor_of
from .rewrite import rewrite
from .smoke import hidden, small_model, small_spec
from .spec import Spec, differing, dump_spec, load_spec, located
from .tasks import Question
from .trace import capture, trace
from .training.checkpoint import checkpoints
from .training.checks import check_training
from .training.evaluation import for_training, objective, referred
from .training.generation import Asked
from .training.loop import device_of, label_weights, tune
from .training.offload import layers_to_offload, offload
from .training.optimisers import OPTIMISERS
from .training.packing import check_packing, packed_inputs
from .training.parallel import processes
from .training.recompute import by_layer, fewest
from .training.schedules import allocate
from .training.sharding import shard, shared_bytes
from .training.start import check_start, choices_of, keep_start, start_values, started_from
from .tuned import TunedModel

_Method = TypeVar("_Method", bound=Callable[..., Any])


@dataclass
class Job:
    """What tuning needs: the model with its weights, examples of what its modes read, encoded rows, how they become
    batches, weights of labels, what there is to say of the rows, what answers are written to, and what the run is to
    know its data by."""

    pretrained: Pretrained
    inputs: dict[str, Inputs]
    train: Dataset
    validation: Dataset
    collate: Callable[[list], dict[str, Tensor]]
    weights: Tensor | None
    notes: list[str]
    questions: list[Question]
    ties: dict[str, str]


@dataclass(frozen=True)
class _Shapes:
    """A model traced on the meta device; `whole`: its train graph too."""

    pretrained: Pretrained
    traced: TracedModel
    whole: bool


def _placed(method: _Method) -> _Method:
    @functools.wraps(method)
    def call(self: "Session", *args: Any, **kwargs: Any) -> Any:
        with located(self.spec):
            return method(self, *args, **kwargs)

    return call


class Session:
    """A spec, and what is made of it.

    Args:
        spec: a file (`<file>#<row>` for one of its variants), or a spec.
        settings: `dotted.key=value` overrides, for a file.
        like: another session; what it knows of the same model and the same data is not found out again.

    Raises:
        SubspanError: the spec is wrong, one line with file, line and column for each mistake; or settings are given
            for a spec that is no file.
    """

    def __init__(self, spec: Spec | str | Path, *settings: str, like: Self | None = None):
        if isinstance(spec, Spec) and settings:
            raise SubspanError(
                f"{settings[0]!r} overrides what a file says; this spec is an object: set its own fields"
            )
        self.spec = spec if isinstance(spec, Spec) else load_spec(spec, list(settings))
        self.run: Path | None = None
        same = like is not None and like.model_key == self.model_key
        self._shapes: _Shapes | None = like._shapes if same else None
        self._checked: dict[str, list[str]] = like._checked if like is not None else {}

    @property
    def model_key(self) -> str:
        """Equal for specs whose models trace alike."""
        train = self.spec.train
        return f"{self.spec.model.model_dump_json()} {train.seed} {train.passes.off} {train.packing}"

    @property
    def tokens(self) -> int:
        """Rows that a linear op reads per step: tokens of text, or about as many patches of images."""
        return self.spec.train.batch_size * self._length

    @property
    def _length(self) -> int:
        return self.spec.data.max_length if self.spec.data else 128

    @_placed
    def shapes(self, whole: bool = False) -> tuple[TracedModel, Pretrained]:
        """The model, traced on the meta device: no weight is read.

        Args:
            whole: trace the train graph too, as a run does; a plan alone needs none.
        """
        spec = self.spec
        check_names(spec.train.passes.off, spec.train.passes.on)
        if self._shapes is None or (whole and not self._shapes.whole):
            pretrained = load_model(spec, meta=True)
            inputs = example_inputs(spec, pretrained)
            modes = ("train", "eval") if whole else ("eval",)
            traced = trace(pretrained.module, inputs, modes, spec.train.passes.off, keep=spec.model.kept)
            check_missing(spec.model.name, pretrained, traced.read())
            self._shapes = _Shapes(pretrained, traced, whole)
        return self._shapes.traced, self._shapes.pretrained

    @_placed
    def plan(self, whole: bool = False) -> Plan:
        """Every site with its shape and counts; no weight is read.

        Args:
            whole: as of `shapes`.

        Raises:
            SubspanError: the spec does not fit the model, or exceeds a limit.
        """
        spec = self.spec
        traced, pretrained = self.shapes(whole)
        found = plan(traced, spec.rules, pretrained.new, spec.strict)
        if spec.task.sequences:
            bounds = (positions(pretrained.model), traced.longest)
            check_length(
                spec, min((most for most in bounds if most is not None), default=None), found.rows + found.moves
            )
            _check_sizes(spec, traced, pretrained)
        raise_all(exceeded(spec.limits, found))
        layers_to_offload(traced, spec.limits.weights, found.new)
        check_training(spec, found, pretrained.labels)
        return replace(found, notes=(*found.notes, *pretrained.notes))

    @_placed
    def cost(self) -> StepCost:
        """What a training step needs, from the train graph on the meta device.

        Raises:
            SubspanError: as `plan`, or the step exceeds a limit.
        """
        spec, found = self.spec, self.plan(whole=True)
        traced, pretrained = self.shapes(whole=True)
        parallel = spec.train.parallel
        size = -(-spec.train.batch_size // parallel.least)
        if spec.train.packing:
            batch = packed_inputs(pretrained.model, size, self._length).kwargs
            batch = {**batch, "labels": torch.zeros_like(batch["input_ids"])}
        else:
            batch = spec.task.example_batch(pretrained.model, size, self._length, pretrained.processor)
        tuned = self._rewritten(traced, found)
        loss, entries, most = objective(spec.task), OPTIMISERS[spec.train.optimiser].entries, spec.limits.activations
        for_training(tuned, spec)
        layers = 0
        if most is not None and not spec.train.gradient_checkpointing:
            with contextlib.suppress(SpecError):  # Without layers, what the step saves is what it saves.
                layers = fewest(tuned, lambda one: saved_bytes(one, batch, loss) <= most)
        if layers:
            by_layer(tuned, layers)
        away = layers_to_offload(traced, spec.limits.weights, found.new)
        names = {name for some in away.values() for name in some}
        held = [one for name, one in traced.named_parameters() if name not in names]
        weights = sum(map(held_bytes, held))
        if parallel.shard > 1:
            weights = shared_bytes(parallel.shard, traced, found.new)
        cost = step_cost(traced, tuned, batch, loss, entries)
        cost = replace(cost, layers=layers, processes=parallel.least, weights=weights, offloaded=len(away))
        raise_all(exceeded(spec.limits, found, cost))
        return cost

    @_placed
    def rewritten(self) -> TunedModel:
        """The traced model with the plan's nodes, on the meta device."""
        return self._rewritten(self.shapes(whole=True)[0], self.plan(whole=True))

    def _rewritten(
        self,
        traced: TracedModel,
        found: Plan,
        values: dict[str, Tensor] | None = None,
        given: frozenset[str] | None = None,
    ) -> TunedModel:
        passes = self.spec.train.passes
        return rewrite(traced, found, self.spec.train.seed, values, passes.off, passes.on, given=given)

    @_placed
    def changes(self) -> dict[str, int]:
        """Pass -> how many nodes it changes in the graphs of the spec: train, eval, and the one that is exported."""
        spec, chosen, changed = self.spec, self.spec.train.passes, {}
        check_names(chosen.off, chosen.on)
        pretrained = load_model(spec, meta=True)
        inputs = example_inputs(spec, pretrained)
        traced = trace(pretrained.module, inputs, without=chosen.off, changed=changed)
        planned = plan(traced, spec.rules, pretrained.new, spec.strict)
        tuned = rewrite(traced, planned, without=chosen.off, also=chosen.on, changed=changed)
        for_training(tuned, spec, changed=changed)
        exported = capture(pretrained.module, inputs["eval"]).graph_module.graph
        run_passes(exported, "export", Context("eval"), chosen.off, chosen.on, changed)
        return changed

    @_placed
    def check_data(self) -> list[str]:
        """Read and check the data where it is on disk, once; where a tokenizer is there too, as a model reads it.

        Returns:
            What there is to say of the rows, as in `prepare`.

        Raises:
            SubspanError: it can't be read, or does not fit the task.
        """
        spec, shapes = self.spec, self.shapes()[1]
        if spec.data is None or any(one.files is None for one in spec.data.sources):
            return []
        key = f"{self.model_key} {spec.model.task_options} {spec.data.model_dump_json()} {spec.writing}"
        if key not in self._checked:
            if shapes.processor is None and not has_processor(spec):
                load_rows(spec, shapes.labels)
                self._checked[key] = []
            else:
                rows, processor, parts = self._encoded("train", "validation")
                questions_of(spec, rows.validation, processor)
                self._checked[key] = _said(parts)
        return self._checked[key]

    @_placed
    def smoke(self) -> dict[str, Any]:
        """Tune, merge, export and compare a small copy of the model, for two steps on real rows, in a temporary folder.

        The copy has the config's first layers (two, or as many as targets name) and random weights; the tokenizer, the
        data, the rules and the settings are the spec's.

        Returns:
            The content of verify.json.

        Raises:
            SubspanError: as `tune` and `export`.
        """
        spec = self.spec
        if spec.data is None:
            raise SpecError("'data' is missing: training needs it")
        shapes, location = self.shapes()[1], location_of(spec.model)
        processor = processor_of(spec, shapes)
        with tempfile.TemporaryDirectory(prefix="subspan-smoke-") as place, hidden(Path(place)):
            small_model(spec, shapes, processor, location, Path(place) / "model")
            session = Session(small_spec(spec, Path(place) / "model"))
            session.tune(Path(place) / "run")
            return session.export()

    @_placed
    def read(self, part: Literal["train", "validation"] = "train") -> tuple[Dataset, list[str], Any]:
        """The encoded rows of a part of the data, what there is to say of them, and what they were read by.

        Raises:
            SubspanError: they can't be read, or do not fit the task.
        """
        _, processor, parts = self._encoded(part)
        return *parts[part], processor

    def _encoded(self, *names: str) -> tuple[Rows, Any, dict[str, tuple[Dataset, list[str]]]]:
        """The rows of the data, what they are read by, and parts of them encoded, each with what there is to say."""
        shapes = self.shapes()[1]
        rows, processor = load_rows(self.spec, shapes.labels), processor_of(self.spec, shapes)
        parts = {}
        for name in names:
            some, notes = getattr(rows, name), []
            found = encode(self.spec, some, processor, shapes.labels, notes)
            parts[name] = found, [*notes, *unseen(self.spec, some, shapes.labels)]
        return rows, processor, parts

    @_placed
    def prepare(self) -> Job:
        """Encode the data, then load the model's weights: what is wrong with rows is said first."""
        spec, task = self.spec, self.spec.task
        rows, processor, parts = self._encoded("train", "validation")
        questions = questions_of(spec, rows.validation, processor)
        pretrained = load_model(spec)
        long: list[str] = []
        if questions:
            from .export.ship import longest_of  # onnx and ONNX Runtime come with it.

            questions, long = short_enough(questions, longest_of(pretrained))
        notes = [*_said(parts), *long, *pretrained.notes]
        inputs = example_inputs(spec, pretrained)
        counts = task.label_counts(rows.train, spec.data.columns, pretrained.labels) if spec.train.class_weights else []
        weights = label_weights(spec, pretrained.labels, counts)
        collate = collator(spec, pretrained, list(inputs["eval"].kwargs))
        train, validation = (parts[name][0] for name in ("train", "validation"))
        ties = {
            "training data": tie(rows.train, train, processor),
            "validation data": tie(rows.validation, validation, processor),
        }
        return Job(pretrained, inputs, train, validation, collate, weights, notes, questions, ties)

    @_placed
    def tune(
        self,
        out: str | Path,
        resume: bool = False,
        overwrite: bool = False,
        tell: Callable[[str], None] | None = None,
        start: str | Path | None = None,
    ) -> dict[str, Any]:
        """Tune into the folder `out`: spec.yaml, plan.json, metrics.json, log.jsonl, checkpoints/, adapter/.

        Args:
            out: made new.
            resume: continue the run in it from its newest checkpoint.
            overwrite: first delete the run that is in it.
            tell: gets a sentence for everything there is to say of the rows: what is cut, what is left out.
            start: folder of a run with the same rules, whose tuned tensors this one starts from.

        Returns:
            The metrics, as `training.loop.tune` has them.

        Raises:
            SubspanError: the folder holds something else, the spec does not fit, the loss is not finite.
            Interrupted: stopped by Ctrl-C or SIGTERM; a checkpoint is written.
        """
        out, main = Path(out), processes().is_main_process
        if start is not None and (resume or Path(start).resolve() == out.resolve()):
            raise SubspanError(
                "--from is for a new run, in another folder than that of the run it starts from; --resume "
                "goes on from what the run has kept of it"
            )
        if main:
            check_folder(self.spec, out, resume, overwrite)
        with claimed(out, main):
            if main:  # Once more: it may have been another's until now.
                check_folder(self.spec, out, resume, overwrite)
            processes().wait_for_everyone()
            metrics = self._tuned(out, resume, overwrite, tell or (lambda note: None), start)
        processes().wait_for_everyone()
        self.run = out
        return metrics

    def _tuned(
        self, out: Path, resume: bool, overwrite: bool, tell: Callable[[str], None], start: str | Path | None
    ) -> dict[str, Any]:
        spec, main = self.spec, processes().is_main_process
        device_of(spec)
        checked = spec.limits.of_a_step or spec.train.gradient_checkpointing
        layers = self.cost().layers if checked else 0
        planned = self.plan()
        if adapter := started_from(out, resume, start):
            check_start(spec, self.shapes()[0], planned, adapter)
        job = self.prepare()
        for note in job.notes if main else ():
            if note not in planned.notes:
                tell(note)
        if main and resume and (last := checkpoints(out / "checkpoints")[-1:]):
            tell(f"goes on from {last[0].name}")
        traced = trace(job.pretrained.module, job.inputs, without=spec.train.passes.off, keep=spec.model.kept)
        if spec.train.packing:
            check_packing(traced, job.train)
        offload(traced, layers_to_offload(traced, spec.limits.weights, planned.new))
        train, validation = (referred(traced, spec, part, job.collate) for part in (job.train, job.validation))
        job = replace(job, train=train, validation=validation)
        if adapter:
            model = self._rewritten(traced, planned, *start_values(traced, adapter))
        else:
            planned, chosen = self._choose(job, traced, planned, out if resume else None)
            model = self._rewritten(traced, planned, chosen)
        if main:
            if overwrite:
                clear(out, (MARKER, LOCK))
            if start is not None:
                keep_start(adapter, out)
            write_text(out / "spec.yaml", dump_spec(spec))
            write_json(out / "plan.json", planned.to_dict())
        processes().wait_for_everyone()
        files = files_of(self.spec.model)
        base = fingerprint(model, model.plan.new)
        tied = {**files, "base model's weights": base, **job.ties}
        if spec.train.parallel.shard > 1:
            shard(spec.train.parallel.shard, (model, traced, job.pretrained.model), model.plan.new)
        parts, more = (job.train, job.validation, job.collate), (job.weights, tied, self._asked(job), layers)
        model, metrics = tune(model, spec, *parts, out, resume, *more)
        if main:
            own = {name: value for name, value in metrics.items() if name != "generated"}  # It shows rows of the data.
            save_adapter(model, out / "adapter", spec, own, files, base)
            write_json(out / "plan.json", model.plan.to_dict())
            write_json(out / "metrics.json", metrics)
        return metrics

    def _asked(self, job: Job) -> Asked | None:
        """What answers are written to, and what writes them."""
        if not job.questions:
            return None
        from .export.writing import writer  # onnx and ONNX Runtime come with it.

        write = writer(self.spec, job.pretrained, job.inputs["eval"], self.spec.writing.tokens)
        return Asked(job.questions, write, job.pretrained.processor)

    def _choose(
        self, job: Job, traced: TracedModel, found: Plan, resumed: Path | None
    ) -> tuple[Plan, dict[str, Tensor]]:
        """What schedules choose by the training data, or what the run to resume chose."""
        if resumed and (choices := choices_of(resumed, found)) is not None:
            given, chosen = choices
            return plan(traced, self.spec.rules, job.pretrained.new, self.spec.strict, given), chosen
        return allocate(traced, found, job.train, job.collate, objective(self.spec.task))

    @_placed
    def export(
        self, run: str | Path | None = None, target: Literal["cpu", "cuda"] = "cpu", measure: bool = False
    ) -> dict[str, Any]:
        """Merge a run's adapter, write merged/ and onnx/, and compare every stage's outputs with the tuned model's.

        Args:
            run: its folder; default: of the run that this session tuned.
            target: what the ONNX files are for.
            measure: make all variants that make sense there, time them, and ship the fastest that holds as
                onnx/model.onnx; else it is the one in float32. export.json lists them.

        Returns:
            The content of verify.json.

        Raises:
            SubspanError: there is no such run, it is of another spec, or a stage differs by more than
                `export.verify.atol`; nothing is written then.
        """
        run = Path(run) if run is not None else self.run
        if run is None:
            raise SubspanError("which run? export(folder), or tune first")
        if others := differing(spec_of(run), self.spec):
            raise SubspanError(f"{run / 'spec.yaml'} is of another run: it differs in {', '.join(others)}")
        from .export.ship import ship  # onnx and ONNX Runtime are imported when something is shipped.

        with claimed(run, made=False):
            check_tied(run / "adapter", self.spec, files_of(self.spec.model))
            return ship(self.spec, run, target, measure)


def _said(parts: Mapping[str, tuple[Dataset, list[str]]]) -> list[str]:
    """What there is to say of the rows of each part, under its name."""
    return [f"{name}: {one}" for name, (_, notes) in parts.items() for one in notes]


def example_inputs(spec: Spec, pretrained: Pretrained, *sizes: int) -> dict[str, Inputs]:
    """Examples of what a model reads, by mode.

    Args:
        sizes: batch and length.
    """
    plain = spec.task.inputs(pretrained.model, *sizes, processor=pretrained.processor)
    return {"train": packed_inputs(pretrained.model, *sizes) if spec.train.packing else plain, "eval": plain}


def _check_sizes(spec: Spec, traced: TracedModel, pretrained: Pretrained) -> None:
    """Refuse batches of the longest rows that a trace is not valid for.

    Raises:
        SpecError: at `data.max_length`.
    """
    if spec.data:
        longest = example_inputs(spec, pretrained, spec.train.batch_size, spec.data.max_length)
        for name in traced.graphs:
            leaves = [torch.zeros(value.shape, dtype=value.dtype) for value in longest[name].kwargs.values()]
            try:
                traced.check_valid(name, leaves)
            except SubspanError as error:
                raise SpecError(str(error), ("data", "max_length")) from None
