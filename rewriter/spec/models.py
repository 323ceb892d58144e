"""The models of a spec: what a user may write, with descriptions and defaults."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    SerializeAsAny,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..algebra.quantised import METHODS
from ..errors import SpecError, SubspanError
from ..tasks import TASKS, Task, task_of
from ..transforms import TRANSFORMS, Transform
from .data import Data
from .limits import Count, Limits, Scalar, Seed, Strict

METRICS = tuple(dict.fromkeys(metric for name in TASKS for metric in task_of(name).metrics))
SCHEDULES = (
    "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
)  # fmt: skip
TRACKERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio")
VARIANTS = (
    "float32", "float32-fused", "float16", "float16-fused", "bfloat16", "int8", "int8-fused", "int8-dynamic",
    "int4",
)  # fmt: skip
Dtype = Literal["float32", "bfloat16", "float16"]


class Quantise(Strict):
    """The frozen weights in few bits: those of linear layers and experts; tables and the tokens' head are in int8."""

    method: Literal[METHODS] = Field(
        description="nf4: 4-bit normal floats, by bitsandbytes; int4: with a zero point; int8: symmetric"
    )
    group: Literal[32, 64, 128, 256] = Field(64, description="entries of a row that share a scale")


class Model(Strict):
    """The pretrained model to adapt."""

    name: str = Field(min_length=1, description="a hub id, a local folder, or package://<package>/<folder>")
    gguf: str | None = Field(None, min_length=1, description="a GGUF file in it, which is read instead of safetensors")
    task: Literal[tuple(TASKS)] = Field(description="decides the head, the loss and the metric")
    task_options: dict[str, Any] = Field(default_factory=dict, description="of the task; docs/tasks.md has them")
    labels: list[str | int] | None = Field(None, min_length=1, description="class names in order; default: the model's")
    dtype: Dtype | None = Field(None, description="storage type of the frozen weights; default: the checkpoint's own")
    quantise: Quantise | None = Field(None, description="store the frozen weights in few bits; default: as they are")
    revision: str | None = Field(None, description="commit or tag of a hub model")
    config: dict[str, Any] | None = Field(
        None, description="the model's config.json, written out: plans need no weights and no network then"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")

    @property
    def kept(self) -> bool:
        """Whether what is traced of it is kept for other runs: code that comes with a model may read anything."""
        return not self.trust_remote_code

    @field_validator("labels")
    @classmethod
    def _unique(cls, labels: list[str | int] | None) -> list[str] | None:
        if labels is None:
            return None
        names = [str(label) for label in labels]
        if len(set(names)) < len(names):
            raise ValueError("labels must differ from each other")
        return names

    @field_validator("gguf")
    @classmethod
    def _inside(cls, gguf: str | None) -> str | None:
        if gguf is not None and ("\0" in gguf or PurePath(gguf).is_absolute() or ".." in PurePath(gguf).parts):
            raise ValueError("expected the name of a file in the model's folder, or a relative path in it")
        return gguf

    @model_validator(mode="after")
    def _alone(self) -> "Model":
        if self.gguf is not None and self.config is not None:
            raise SpecError("a GGUF file has the model's config in it", ("model", "config"), at_key=True)
        return self

    @model_validator(mode="after")
    def _options(self) -> "Model":
        try:
            task_of(self.task, self.task_options)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            known = task_of(self.task).Options.model_fields
            place, message = ("model", "task_options", *first["loc"]), first["msg"][0].lower() + first["msg"][1:]
            if first["type"] == "extra_forbidden":
                has = f"has {', '.join(known)}" if known else "has none"
                raise SpecError(f"unknown key {first['loc'][0]!r}; {self.task} {has}", place, at_key=True) from None
            raise SpecError(f"{message}, not {first['input']!r}", place) from None
        return self


def _range(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value) and 0 <= value[0] < value[1]:
        return value
    raise ValueError("expected [start, stop] with 0 <= start < stop")


class Slice(Strict):
    """A part of a fused weight, in the orientation y = xW: columns (`out`) or rows (`in`), half-open."""

    out: Annotated[list[int], BeforeValidator(_range)] | None = Field(None, description="[start, stop) of the outputs")
    in_: Annotated[list[int], BeforeValidator(_range)] | None = Field(
        None, alias="in", description="[start, stop) of the inputs"
    )

    @model_validator(mode="after")
    def _one(self) -> "Slice":
        if (self.out is None) == (self.in_ is None):
            raise ValueError("give either `out` or `in`")
        return self

    @property
    def axis(self) -> str:
        """ "out" or "in"."""
        return "out" if self.out else "in"

    @property
    def bounds(self) -> tuple[int, int]:
        """start and stop, half-open."""
        start, stop = self.out or self.in_
        return start, stop


def _link(value: Any) -> Any:
    """One transform of a chain, from its name, or {name: {option: value}}."""
    if isinstance(value, BaseModel):
        return value
    if isinstance(value, str):
        value = {value: {}}
    if not (isinstance(value, dict) and len(value) == 1 and all(isinstance(key, str) for key in value)):
        raise PydanticCustomError("no_transform", "expected a method: its name, or {name: {option: value}}")
    ((name, options),) = value.items()
    if name not in TRANSFORMS:
        raise PydanticCustomError("unknown_transform", "unknown method {name}", {"name": name})
    if name in TRANSFORMS.ambiguous:
        one, other = TRANSFORMS.ambiguous[name]
        raise ValueError(f"two packages have a transform {name}: {one} and {other}; uninstall one of them")
    return link_model(TRANSFORMS[name]).model_validate({name: {} if options is None else options})


@cache
def link_model(one: Transform) -> type[BaseModel]:
    """The model of a transform in a chain: {name: options}."""
    config = ConfigDict(extra="forbid", strict=True, frozen=True)
    return create_model(f"{one.name}_transform", __config__=config, **{one.name: (one.options, ...)})


# Any registered transform; which there are is known when a spec is read.
Link = Annotated[SerializeAsAny[BaseModel], PlainValidator(_link, json_schema_input_type=dict[str, Any])]


class Rule(Strict):
    """Which weights get which transforms."""

    target: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] = Field(
        description="globs over parameter names: * in a part, ** across parts, {a,b}"
    )
    apply: list[Link] = Field(min_length=1, description="the chain, applied first to last: f, then g")
    slice: Slice | None = Field(None, description="only a part of each matched weight")

    @property
    def targets(self) -> list[str]:
        """The patterns, as a list."""
        return [self.target] if isinstance(self.target, str) else self.target

    @property
    def chain(self) -> list[tuple[Transform, BaseModel]]:
        """The transforms with their options, first to last."""
        return [(TRANSFORMS[name], getattr(link, name)) for link in self.apply for name in type(link).model_fields]


class Passes(Strict):
    """Which of the graph's passes run; `subspan passes` lists them."""

    off: list[str] = Field(default_factory=list, description="names of passes to leave out")
    on: list[str] = Field(default_factory=list, description="names of passes that change numerics, to run all the same")


class Generate(Strict):
    """What is written of validation rows at evaluations: exact_match, rouge and bleu of it are measured."""

    rows: Count = Field(64, description="the first validation rows that have an answer")
    tokens: Count = Field(64, le=2**16, description="most tokens of what is written of a row")
    steps: Count | None = Field(None, description="optimiser steps between them; default: at every evaluation")
    samples: Annotated[int, Field(ge=0, le=2**20)] = Field(2, description="rows that the log shows")


class Parallel(Strict):
    """How the processes that `torchrun` starts share a run."""

    shard: Count = Field(1, description="processes that share the frozen weights out among them")
    data: Count | None = Field(None, description="how many such groups there are; default: as many as fit")

    @property
    def least(self) -> int:
        """The fewest processes that it says."""
        return self.shard * (self.data or 1)


class Train(Strict):
    """How the new tensors are tuned."""

    epochs: float = Field(1, gt=0, le=1e6, description="passes over the training data")
    max_steps: Count | None = Field(None, description="optimiser steps, instead of `epochs`")
    batch_size: Count = Field(32, le=2**16, description="rows per step, over all devices")
    gradient_accumulation: Count = Field(1, description="batches per optimiser step")
    optimiser: Literal["adamw", "sgd", "adafactor"] = Field("adamw", description="sgd has a momentum of 0.9")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    schedule: Literal[SCHEDULES] = Field("linear", description="of the learning rate, after the warm-up")
    schedule_options: dict[str, Scalar] = Field(
        default_factory=dict, description="of that schedule, as transformers.get_scheduler takes them"
    )
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the steps that warm up")
    weight_decay: float = Field(0.0, ge=0, le=1e6, description="decoupled weight decay; added to the gradient by sgd")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of a label's mass spread over all labels")
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0, le=1e6)]] | None = Field(
        None, description="weight of each label in the training loss; balanced: by how rare it is"
    )
    group_by_length: bool = Field(False, description="batches of rows of like lengths")
    packing: bool = Field(
        False, description="several rows in one sequence of up to `max_length` tokens, none of which sees another"
    )
    gradient_checkpointing: bool = Field(
        False, description="keep a layer's inputs alone for the backward and compute the rest again: memory for time"
    )
    memory: Literal["fast", "lean"] = Field(
        "fast",
        description="lean: activations and norms that tuned factors read are computed again in the backward, and "
        "freed blocks go back to the system",
    )
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this 2-norm; 0 turns it off")
    precision: Dtype = Field("float32", description="type of the computation (autocast); half types want CUDA")
    metric: Literal[METRICS] | None = Field(None, description="validation metric; default: the task's first")
    seed: Seed = Field(0, description="seed of heads, start values, order and dropout")
    evaluate_steps: Count | None = Field(None, description="optimiser steps between evaluations; default: every epoch")
    evaluate_start: bool = Field(False, description="evaluate before the first step too")
    generate: Generate | None = Field(
        None, description="write answers to validation rows too; default: only where `metric` is measured of them"
    )
    keep: Literal["last", "best"] = Field("last", description="which state is shipped: the last, or the best evaluated")
    patience: Count | None = Field(None, description="stop after so many evaluations without a better one")
    track: list[Literal[TRACKERS]] = Field(default_factory=list, description="experiment trackers that get the log too")
    parallel: Parallel = Field(Parallel(), description="how several processes share the run")
    log_steps: Count = Field(10, description="optimiser steps between log lines")
    checkpoint_steps: Count = Field(50, description="optimiser steps between checkpoints")
    checkpoint_keep: Count = Field(2, description="checkpoints kept")
    passes: Passes = Field(Passes(), description="passes over the rewritten graph")


class Onnx(Strict):
    """ONNX export."""

    opset: Annotated[int, Field(ge=18, le=23)] = Field(18, description="ONNX operator set")


class Verify(Strict):
    """How equal the stages must be."""

    atol: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="largest absolute difference of any output; null: 4 times the tuned model's own rounding",
    )


class Export(Strict):
    """What is shipped."""

    checkpoint: bool = Field(True, description="write merged/, which from_pretrained loads")
    onnx: Onnx | None = Field(Onnx(), description="write onnx/; null: don't")
    verify: Verify = Field(Verify(), description="the comparison of all stages")
    variants: list[Literal[VARIANTS]] | None = Field(
        None, min_length=1, description="ONNX files to make; default: all that make sense on the target, if measured"
    )
    latency: list[Annotated[list[Annotated[int, Field(ge=1, le=2**20)]], Field(min_length=2, max_length=2)]] | None = (
        Field(None, description="[batch size, length] of the inputs to time files with; default: [[1, 32], [8, 128]]")
    )


class Spec(Strict):
    """A whole run: model, data, rules, training and export."""

    version: Literal[1] = Field(description="version of this format")
    meta: dict[str, Scalar] = Field(default_factory=dict, description="where the spec comes from; not read")
    model: Model
    data: Data | None = Field(None, description="needed for training")
    rules: list[Rule] = Field(min_length=1, description="which weights get which transforms")
    train: Train = Field(Train(), description="how the new tensors are tuned")
    export: Export = Field(Export(), description="what is shipped")
    limits: Limits = Field(Limits(), description="what the plan may cost at most")
    strict: bool = Field(False, description="warnings of the plan are errors")

    _locate: Callable[[SpecError], SubspanError] | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _metric(self) -> "Spec":
        if self.data:
            _check_source(self.task, self.data)
        known = self.task.metrics_of(self.columns)
        _check_writing(self.task, self.train, self.columns)
        if self.train.metric and self.train.metric not in known:
            raise SpecError(
                f"metric {self.train.metric!r} does not fit {self.model.task}: use one of {', '.join(known)}",
                ("train", "metric"),
            )
        for key, there in (
            ("label_smoothing", self.task.smooths),
            ("class_weights", self.task.labelled),
            ("group_by_length", self.task.sequences),
            ("packing", self.task.packs),
        ):
            if getattr(self.train, key) and not there:
                raise SpecError(f"{self.model.task} has no use for it", ("train", key), at_key=True)
        _check_chat(self.task, self.data)
        if self.train.packing and self.train.group_by_length:
            raise SpecError("packed rows are in no group; leave out one of the two", ("train", "group_by_length"), True)
        if self.model.labels and not self.task.labelled:
            raise SpecError(f"{self.model.task} has no labels", ("model", "labels"), at_key=True)
        if self.data and self.train.batch_size < (least := self.task.least(self.columns)):
            raise SpecError(f"{self.model.task} needs {least} rows to learn from, at least", ("train", "batch_size"))
        if self.limits.weight_memory is not None and self.train.parallel.shard > 1:
            said = "weights are shared out among processes, or kept in the CPU's memory: leave out one of the two"
            raise SpecError(said, ("limits", "weight_memory"), at_key=True)
        if self.train.warmup and self.train.schedule == "reduce_lr_on_plateau":
            raise SpecError("reduce_lr_on_plateau has no warm-up", ("train", "warmup"))
        return self

    @property
    def task(self) -> Task:
        """What the model is for."""
        return task_of(self.model.task, self.model.task_options)

    @property
    def columns(self) -> Mapping[str, str]:
        """Role -> column; empty where the spec has no data."""
        return self.data.columns if self.data else {}

    @property
    def metric(self) -> str:
        """The validation metric: the one given, else the task's first."""
        return self.train.metric or self.task.metrics_of(self.columns)[0]

    @property
    def compared(self) -> str:
        """The metric of the model's outputs: the validation metric, or the task's first where that is of what is
        written."""
        return self.task.metrics_of(self.columns)[0] if self.task.written(self.metric) else self.metric

    @property
    def writing(self) -> Generate | None:
        """How answers to validation rows are written and measured; None where they are not."""
        asked = self.train.generate or (Generate() if self.task.written(self.metric) else None)
        return asked if self.task.writes else None

    def locate(self, error: SpecError) -> SubspanError:
        """`error` as one line with file, line and column, if the spec came from a file."""
        return self._locate(error) if self._locate else error


def _check_writing(task: Task, train: Train, columns: Mapping[str, str]) -> None:
    """Something is written only by tasks that write, and of rows that say what is to be written."""
    if train.parallel.shard > 1 and (train.generate or task.written(train.metric or "")):
        said = "what is written differs in length from process to process, so that they can't share weights out for it"
        raise SpecError(said, ("train", "parallel", "shard"))
    if train.generate and not task.writes:
        raise SpecError(f"{task.name} has no use for it", ("train", "generate"), at_key=True)
    if columns and task.writes and not task.replies(columns):
        said = f"the column {', '.join(columns)} has no answer that what is written can be compared with"
        if train.generate:
            raise SpecError(said, ("train", "generate"), at_key=True)
        if train.metric and task.written(train.metric):
            raise SpecError(f"{said}: use one of {', '.join(task.metrics_of(columns))}", ("train", "metric"))


def _check_source(task: Task, data: Data) -> None:
    """Chats are made for tasks that read them, and the columns are those that the task reads."""
    for i, source in enumerate(data.sources):
        place = ("data", "mixture", i) if data.mixture else ("data",)
        if source.chat and ("messages",) not in task.ways:
            raise SpecError(f"{task.name} reads no chats", (*place, "chat"), at_key=True)
        _check_columns(task, source.columns, (*place, "columns"))


def _check_chat(task: Task, data: Data | None) -> None:
    """What says how texts become tokens is for tasks that read it, and for the columns that it is of."""
    if data is None:
        return
    for key in ("long", "template", "loss"):
        value = getattr(data, key)
        if value != Data.model_fields[key].default and (why := task.useless(key, value, data.columns)) is not None:
            raise SpecError(why, ("data", key), at_key=True)
    for i, source in enumerate(data.sources):
        if source.turns is not None and (why := task.useless("turns", source.turns, source.columns)) is not None:
            raise SpecError(why, ("data", "mixture", i, "turns") if data.mixture else ("data", "turns"), at_key=True)


def _check_columns(task: Task, columns: Mapping[str, str], place: tuple[str | int, ...]) -> None:
    required = [role for role, one in task.roles.items() if one.required]
    known = [*required, *(role for role in task.roles if role not in required)]
    for role in columns:
        if role not in known:
            raise SpecError(
                f"unknown key {role!r}{nearest(role, known)}; {task.name} reads {', '.join(known)}",
                (*place, role),
                at_key=True,
            )
    for role in required:
        if role not in columns:
            needs = f"{task.name} needs the columns {', '.join(required)}"
            raise SpecError(f"{role!r} is missing: {needs}", place)
    if task.ways and not any(set(way) == columns.keys() for way in task.ways):
        ways = ", or ".join(" and ".join(way) for way in task.ways)
        raise SpecError(f"{task.name} reads {ways}; not {', '.join(columns)}", place)


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" with the nearest of the known words; nothing where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
