"""The spec: what a user writes, as strict pydantic models; errors carry file, line and column."""

import copy
import difflib
import io
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML

from .errors import LocatedError, SpecError, SubspanError, UnreachableError, raise_all
from .transforms import METHODS, Method
from .yamlmap import YamlError, YamlMap, parse, parse_scalar

Task = Literal[
    "sequence-classification",
    "regression",
    "causal-lm",
    "seq2seq-lm",
    "image-classification",
    "token-classification",
]
Metric = Literal["accuracy", "f1", "matthews_correlation", "mse", "pearson", "perplexity", "loss"]
METRICS: dict[str, tuple[str, ...]] = {
    "sequence-classification": ("accuracy", "f1", "matthews_correlation", "loss"),
    "token-classification": ("accuracy", "f1", "loss"),
    "image-classification": ("accuracy", "f1", "matthews_correlation", "loss"),
    "regression": ("mse", "pearson", "loss"),
    "causal-lm": ("perplexity", "loss", "accuracy"),
    "seq2seq-lm": ("perplexity", "loss", "accuracy"),
}
Dtype = Literal["float32", "bfloat16", "float16"]
Count = Annotated[int, Field(ge=1, le=2**53)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, populate_by_name=True)


class Model(_Model):
    """The pretrained model to adapt."""

    name: str = Field(min_length=1, description="a hub id, a local folder, or package://<package>/<folder>")
    task: Task = Field(description="decides the head, the loss and the metric")
    labels: list[str | int] | None = Field(None, min_length=1, description="class names in order; default: the model's")
    dtype: Dtype = Field("float32", description="storage type of the frozen weights")
    revision: str | None = Field(None, description="commit or tag of a hub model")
    config: dict[str, Any] | None = Field(
        None, description="the model's config.json, written out: plans need no weights and no network then"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")

    @field_validator("labels")
    @classmethod
    def _unique(cls, labels: list[str | int] | None) -> list[str] | None:
        if labels is None:
            return None
        names = [str(label) for label in labels]
        if len(set(names)) < len(names):
            raise ValueError("labels must differ from each other")
        return names


class Split(_Model):
    """A share of the training data held out."""

    validation: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] = Field(
        description="rows (an integer) or share (a fraction) to hold out"
    )
    seed: Seed = Field(0, description="seed of the shuffle before the split")


class Limit(_Model):
    """At most so many rows."""

    train: Count | None = Field(None, description="rows of training data; default: all")
    validation: Count | None = Field(None, description="rows of validation data; default: all")


Files = str | list[str]
Scalar = str | int | float | bool | None
# What `datasets` reads from files, less the formats that run queries or load pickles.
Format = Literal["csv", "json", "parquet", "arrow", "text", "imagefolder"]


class Data(_Model):
    """The data set, as `datasets.load_dataset` reads it."""

    format: Format | None = Field(None, description="how `files` are read")
    options: dict[str, Scalar | list[Scalar]] = Field(
        default_factory=dict, description="of that reader, e.g. {sep: ';', column_names: [id, label, text]} for csv"
    )
    files: Files | dict[Literal["train", "validation"], Files] | None = Field(
        None, description="paths or package:// resources, or {train: ..., validation: ...}"
    )
    name: str | None = Field(None, description="hub id of a data set, instead of `format` and `files`")
    config: str | None = Field(None, description="configuration of the hub data set")
    where: dict[str, str | int | float | bool | list[str | int]] = Field(
        default_factory=dict, description="keep rows whose column equals the value, or is in the list"
    )
    split: Split | None = Field(None, description="hold out a part of the training data")
    limit: Limit = Field(Limit(), description="use only so many rows, after filter and split")
    columns: dict[str, str] = Field(description="role -> column: text, text_pair, label, tokens, image")
    max_length: Count = Field(128, le=2**20, description="longest sequence, in tokens; longer texts are cut")

    @model_validator(mode="after")
    def _source(self) -> "Data":
        if (self.files is None) == (self.name is None):
            raise ValueError("give either `format` and `files`, or `name` of a hub data set")
        if self.files is not None and self.format is None:
            raise ValueError("`files` needs a `format`, e.g. csv")
        if clash := {"data_files", "data_dir", "name", "path", "split", "trust_remote_code"} & self.options.keys():
            raise ValueError(f"`options` are of the format's reader; it has no {min(clash)!r}")
        return self


def _range(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value) and 0 <= value[0] < value[1]:
        return value
    raise ValueError("expected [start, stop] with 0 <= start < stop")


class Slice(_Model):
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


def _method_of(value: Any) -> str | None:
    if isinstance(value, BaseModel):
        return next(iter(type(value).model_fields))
    if isinstance(value, dict) and len(value) == 1:
        return next(iter(value))
    return value if isinstance(value, str) else None


def _expand(value: Any) -> Any:
    if isinstance(value, str):
        return {value: {}}
    return (
        {key: {} if options is None else options for key, options in value.items()}
        if isinstance(value, dict)
        else value
    )


def _step(method: Method) -> Any:
    config = ConfigDict(extra="forbid", strict=True, frozen=True)
    model = create_model(f"{method.name}_step", __config__=config, **{method.name: (method.options, ...)})
    return Annotated[model, BeforeValidator(_expand), Tag(method.name)]


Step = Annotated[typing.Union[tuple(_step(m) for m in METHODS.values())], Discriminator(_method_of)]  # noqa: UP007


class Rule(_Model):
    """Which weights get which transforms."""

    target: str | list[str] = Field(description="globs over parameter names: * in a part, ** across parts, {a,b}")
    apply: list[Step] = Field(min_length=1, description="the chain, applied first to last: f, then g")
    slice: Slice | None = Field(None, description="only a part of each matched weight")

    @property
    def targets(self) -> list[str]:
        """The patterns, as a list."""
        return [self.target] if isinstance(self.target, str) else self.target

    @property
    def chain(self) -> list[tuple[Method, BaseModel]]:
        """The methods with their options, first to last."""
        return [(METHODS[name], getattr(step, name)) for step in self.apply for name in type(step).model_fields]


class Train(_Model):
    """How the new tensors are tuned."""

    epochs: float = Field(1, gt=0, description="passes over the training data")
    batch_size: Count = Field(32, le=2**16, description="sequences per step and device")
    gradient_accumulation: Count = Field(1, description="batches per optimiser step")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="decay after the warm-up")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the steps that warm up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this 2-norm; 0 turns it off")
    precision: Dtype = Field("float32", description="type of the computation (autocast); half types want CUDA")
    metric: Metric | None = Field(None, description="validation metric; default: the task's first")
    seed: Seed = Field(0, description="seed of heads, start values, order and dropout")
    log_steps: Count = Field(10, description="optimiser steps between log lines")
    checkpoint_steps: Count = Field(50, description="optimiser steps between checkpoints")
    checkpoint_keep: Count = Field(2, description="checkpoints kept")


class Onnx(_Model):
    """ONNX export."""

    opset: Annotated[int, Field(ge=18, le=23)] = Field(18, description="ONNX operator set")


class Verify(_Model):
    """How equal the stages must be."""

    atol: float = Field(1e-4, gt=0, description="largest absolute difference of any output")


_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _amount(value: str, units: Mapping[str, float], expected: str) -> float:
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([A-Za-z%]{1,3})", value)
    if not found or found[2].lower() not in units:
        raise ValueError(f"expected {expected}")
    return float(found[1]) * units[found[2].lower()]


def _quantity(units: Mapping[str, float], expected: str) -> Any:
    """The type of a text that `_amount` reads."""

    def check(value: str) -> str:
        _amount(value, units, expected)
        return value

    return Annotated[str, AfterValidator(check)]


Parameters = Annotated[int, Field(ge=0)] | _quantity({"%": 1}, "a count, or a share of all parameters such as 0.5%")


class Limits(_Model):
    """What a plan may cost at most; one that exceeds a limit is refused."""

    trainable_parameters: Parameters | None = Field(
        None, description="tuned parameters, new heads apart: a count, or a share of all parameters such as 0.5%"
    )
    head_parameters: Parameters | None = Field(
        None, description="parameters of new heads: a count, or a share of all parameters"
    )
    activation_memory: Annotated[int, Field(ge=0)] | _quantity(_UNITS, "bytes, or a size such as 8 GiB") | None = Field(
        None, description="bytes that a batch's forward saves for its backward, or a size such as 8 GiB"
    )
    overhead_flops: _quantity({"%": 1}, "a share such as 5%") | None = Field(
        None, description="a step's FLOPs beyond the frozen model's forward and input gradient, such as 5%"
    )

    def parameters(self, name: str, total: int) -> float | None:
        """The limit `name` as a count, of a model of `total` parameters."""
        value = getattr(self, name)
        return _amount(value, {"%": 0.01 * total}, "") if isinstance(value, str) else value

    @property
    def activations(self) -> float | None:
        """`activation_memory` in bytes."""
        value = self.activation_memory
        return _amount(value, _UNITS, "") if isinstance(value, str) else value

    @property
    def overhead(self) -> float | None:
        """`overhead_flops` as a fraction."""
        return None if self.overhead_flops is None else _amount(self.overhead_flops, {"%": 0.01}, "")

    @property
    def of_a_step(self) -> bool:
        """Whether a limit is of a whole training step, which has to be traced."""
        return self.activation_memory is not None or self.overhead_flops is not None


class Export(_Model):
    """What is shipped."""

    checkpoint: bool = Field(True, description="write merged/, which from_pretrained loads")
    onnx: Onnx | None = Field(Onnx(), description="write onnx/; null: don't")
    verify: Verify = Field(Verify(), description="the comparison of all stages")


class Spec(_Model):
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

    _source: "Source | None" = PrivateAttr(None)

    @model_validator(mode="after")
    def _metric(self) -> "Spec":
        known = METRICS[self.model.task]
        if self.train.metric and self.train.metric not in known:
            raise SpecError(
                f"metric {self.train.metric!r} does not fit {self.model.task}: use one of {', '.join(known)}",
                ("train", "metric"),
            )
        if self.data:
            _check_columns(self.model.task, self.data.columns)
        return self

    @property
    def metric(self) -> str:
        """The validation metric: the one given, else the task's first."""
        return self.train.metric or METRICS[self.model.task][0]

    @property
    def prompt_length(self) -> int:
        """Positions that soft prompts take, beside the text's."""
        chains = (options for rule in self.rules for method, options in rule.chain if "embeddings" in method.on)
        return sum(options.length for options in chains)

    def locate(self, error: SpecError) -> SubspanError:
        """`error` as one line with file, line and column, if the spec came from a file."""
        return self._source.locate(error) if self._source else error


ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sequence-classification": (("text", "label"), ("text_pair",)),
    "regression": (("text", "label"), ("text_pair",)),
    "causal-lm": (("text",), ()),
    "seq2seq-lm": (("text", "label"), ()),
    "image-classification": (("image", "label"), ()),
    "token-classification": (("tokens", "label"), ()),
}


def _check_columns(task: str, columns: dict[str, str]) -> None:
    required, optional = ROLES[task]
    for role in columns:
        if role not in required + optional:
            known = required + optional
            raise SpecError(
                f"unknown key {role!r}{_nearest(role, known)}; {task} reads {', '.join(known)}",
                ("data", "columns", role),
                at_key=True,
            )
    for role in required:
        if role not in columns:
            raise SpecError(f"{role!r} is missing: {task} needs the columns {', '.join(required)}", ("data", "columns"))


class Source:
    """Where a spec came from: turns paths inside it into file, line and column."""

    def __init__(
        self,
        file: str,
        places: YamlMap,
        overrides: dict[tuple[str | int, ...], str],
        variant: tuple[str | int, ...] = (),
    ):
        self.file, self.places, self.overrides, self.variant = file, places, overrides, variant

    def locate(self, error: SpecError) -> SubspanError:
        """`<file>:<line>:<column>: <path>: <message>`, or the --set that is to blame."""
        dotted = _dotted(error.path)
        text = f"{dotted}: {error.message}" if dotted else error.message
        for path, argument in self.overrides.items():
            if error.path[: len(path)] == path:
                return SubspanError(f"--set {argument}: {text}")
        path = error.path
        if self.variant:
            own = self.places.data["variants"][self.variant[1]]
            path = (*self.variant, *path) if not path or path[0] in own else path
        reachable = not isinstance(error, UnreachableError)
        return LocatedError(self.file, *self.places.locate(path, error.at_key), text, reachable)


def load_spec(path: str | Path, overrides: list[str] | None = None) -> Spec:
    """Read and validate a spec.

    Args:
        path: a YAML file; `<file>#<row>` for the variant whose meta.row that is.
        overrides: `dotted.key=value` settings; list items by number, e.g. `rules.0.apply.0.lora.rank=4`.

    Raises:
        SubspanError: one line with file, line and column of the first mistake, or the file holds several variants.
    """
    file, mark, row = str(path).partition("#")
    specs = load_specs(file, overrides)
    picked = [spec for spec in specs if str(spec.meta.get("row")) == row] if mark else specs
    if len(picked) != 1:
        rows = ", ".join(str(spec.meta.get("row")) for spec in specs[:8])
        raise SubspanError(f"{path}: name one of its variants as {file}#<row>; the first rows are {rows}")
    return picked[0]


def load_specs(path: str | Path, overrides: list[str] | None = None) -> list[Spec]:
    """All specs of a file: one, or one for every variant.

    With `variants`, each of them replaces keys of the spec (its `meta` adds to the spec's). `values: {row: [10, 23],
    rank: [2, 4]}` makes one for every place in the lists; a value `$rank` stands for the rank, or for what `let` says.

    Raises:
        SubspanError: as `load_spec`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LocatedError(str(path), 1, 1, 1, f"not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        raise UnreachableError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        places = parse(text)
    except YamlError as error:
        raise LocatedError(str(path), error.line, error.column, error.width, error.message) from None
    if not isinstance(places.data, dict):
        known = ", ".join(Spec.model_fields)
        raise LocatedError(str(path), *places.locate(()), f"a spec is a mapping with the keys {known}")
    data = copy.deepcopy(places.data)
    source = Source(str(path), places, {})
    specs = []
    for made, prefix in _variants(data, source):
        arguments = dict(_override(made, argument) for argument in overrides or [])
        specs.append(_validated(made, Source(str(path), places, arguments, prefix)))
    return specs


def _variants(data: dict, source: "Source") -> Iterator[tuple[dict, tuple[str | int, ...]]]:
    """The specs that a file stands for, and where in it each is written."""
    if "variants" not in data:
        yield data, ()
        return
    variants, let = data.pop("variants"), data.pop("let", {})
    if not (isinstance(variants, list) and variants and isinstance(let, dict)):
        raise source.locate(SpecError("expected a list of variants, and `let` as a mapping", ("variants",)))
    for i, variant in enumerate(variants):
        path = ("variants", i)
        values = variant.pop("values", {}) if isinstance(variant, dict) else None
        lists = list(values.values()) if isinstance(values, dict) else [None]
        if not all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists):
            raise source.locate(SpecError("expected keys of a spec, and `values` as lists of equal length", path))
        for row in zip(*lists, strict=True) if lists else [()]:
            made = copy.deepcopy(data | variant)
            if isinstance(data.get("meta"), dict) and isinstance(variant.get("meta"), dict):
                made["meta"] = data["meta"] | variant["meta"]
            yield _substituted(made, let | dict(zip(values, row, strict=True))), path


def _substituted(value: Any, names: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return {key: _substituted(one, names) for key, one in value.items()}
    if isinstance(value, list):
        return [_substituted(one, names) for one in value]
    return names.get(value[1:], value) if isinstance(value, str) and value.startswith("$") else value


def _validated(data: dict, source: "Source") -> Spec:
    try:
        spec = Spec.model_validate(data)
    except ValidationError as error:
        raise_all([source.locate(one) for one in _explained(error, data)])
    except SpecError as error:
        raise source.locate(error) from None
    spec._source = source
    return spec


def warned(warning: str) -> SpecError:
    """A warning of a plan as a mistake at its rule, for its place: it starts with `rules[0]: ` if it has one."""
    index = re.match(r"rules\[(\d+)\]: ", warning)
    return SpecError(warning, ("rules", int(index[1]), "target") if index else ("rules",))


def dump_spec(spec: Spec) -> str:
    """The resolved spec as YAML: every default written out."""
    out = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False
    writer.dump(spec.model_dump(mode="json", by_alias=True, exclude_none=False), out)
    return out.getvalue()


def _override(data: dict, argument: str) -> tuple[tuple[str | int, ...], str]:
    key, equals, value = argument.partition("=")
    if not equals or not key:
        raise SubspanError(f"--set {argument}: expected key=value, e.g. train.epochs=2")
    path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    try:
        parsed = parse_scalar(value)
    except YamlError as error:
        raise SubspanError(f"--set {argument}: {error.message}") from None
    place: Any = data
    for i, part in enumerate(path):
        last = i == len(path) - 1
        if isinstance(place, list) and isinstance(part, int) and part < len(place):
            if last:
                place[part] = parsed
            place = place[part]
        elif isinstance(place, dict):
            if last:
                place[str(part)] = parsed
            elif place.get(str(part)) is None:
                place[str(part)] = {}
            place = place[str(part)]
        else:
            raise SubspanError(f"--set {argument}: the spec has no {_dotted(path[: i + 1])}")
    return path, argument


def _dotted(path: tuple[str | int, ...]) -> str:
    out = ""
    for part in path:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else part
    return out


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def _known_keys(path: tuple[str | int, ...]) -> list[str]:
    models: list[type[BaseModel]] = [Spec]
    for part in path:
        if isinstance(part, str):
            found = [f.annotation for m in models for n, f in m.model_fields.items() if part in (n, f.alias)]
            models = [model for annotation in found for model in _models(annotation)] if found else []
    return [field.alias or name for model in models for name, field in model.model_fields.items()]


def _explained(error: ValidationError, data: Any) -> list[SpecError]:
    """All mistakes, in words, one for each place."""
    problems = error.errors(include_url=False)
    misspelt = {one["loc"][:-1] for one in problems if one["type"] == "extra_forbidden"}
    # A misspelt key often leaves a required one missing: the misspelling is the mistake.
    told = [_explain(one, data) for one in problems if one["type"] != "missing" or one["loc"][:-1] not in misspelt]
    by_path: dict[tuple[str | int, ...], list[SpecError]] = {}
    for one in told:
        by_path.setdefault(one.path, []).append(one)
    return [_either(several) for several in by_path.values()]


def _either(several: list[SpecError]) -> SpecError:
    """One mistake of what each alternative of a union says."""
    first, messages = several[0], list(dict.fromkeys(one.message for one in several))
    expected = [message for message in messages if message.startswith("expected ")]
    message = expected[0] if expected else ", or ".join(messages)
    return SpecError(message, first.path, first.at_key)


def _explain(problem: Mapping[str, Any], data: Any) -> SpecError:
    """One mistake; its path as the user wrote it (pydantic's own steps through unions left out)."""
    path: list[str | int] = []
    place = data
    for part in problem["loc"]:
        if (isinstance(place, dict) and part in place) or (isinstance(place, list) and isinstance(part, int)):
            path.append(part)
            place = place[part]
    kind, context, last = problem["type"], problem.get("ctx", {}), problem["loc"][-1] if problem["loc"] else ""
    if kind == "extra_forbidden":
        known = _known_keys(tuple(path[:-1]))
        message = f"unknown key {last!r}{_nearest(str(last), known)}"
        message += f" (known: {', '.join(known)})" if known else ""
        return SpecError(message, (*path[:-1], last), True)
    if kind == "missing":
        return SpecError(f"{last!r} is missing", tuple(path))
    if kind == "union_tag_invalid":
        tag = context["tag"]
        at_key = isinstance(place, dict) and tag in place
        near = _nearest(tag, METHODS)
        message = f"unknown method {tag!r}" + (near or f"; there are {', '.join(METHODS)}")
        return SpecError(message, (*path, tag) if at_key else tuple(path), at_key)
    if kind == "union_tag_not_found":
        return SpecError("expected a method: its name, or {name: {option: value}}", tuple(path))
    if kind == "value_error":
        return SpecError(str(context["error"]), tuple(path))
    message = problem["msg"][0].lower() + problem["msg"][1:]
    shown = repr(problem["input"])
    if isinstance(problem["input"], str | int | float | bool) and len(shown) < 60:
        message += f", not {shown}"
    if isinstance(problem["input"], str) and re.fullmatch(r"[-+.0-9eE]{1,40}", problem["input"]):
        message += "; write it without quotes"
    message = message.replace("input should be", "should be").replace(" after validation", "")
    return SpecError(message, tuple(path))
