"""The pretrained model that a spec names, through transformers: on the meta device for plans, with weights for runs."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate.utils import set_seed
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers.utils import logging as hf_logging

from .errors import SpecError, SubspanError, UnreachableError, reason
from .graph.traced import Inputs
from .resources import is_local, resolve
from .spec import Model, Spec
from .tasks import Task, task_of
from .tasks.base import Collate

NAME = ("model", "name")


@dataclass
class Pretrained:
    """A Hugging Face model, and what its task makes of it.

    Attributes:
        model: as transformers loads it.
        new: names of its newly made parameters (a head, usually).
        labels: class names in order; empty for tasks without classes.
        module: what is traced and exported, with the same parameters.
    """

    model: nn.Module
    new: frozenset[str]
    labels: list[str]
    module: nn.Module


def load_model(spec: Spec, meta: bool = False) -> Pretrained:
    """Load the model of a spec; new parameters are drawn with the spec's seed.

    Only safetensors files are read.

    Args:
        meta: shapes alone, on the meta device; no weight is read.

    Raises:
        SpecError: the model can't be found or loaded, or its head does not fit the task.
    """
    written = spec.model
    location = resolve(written.name, NAME)
    written_out = meta and written.config is not None
    if not written_out and is_local(location) and not os.path.exists(location):
        raise SpecError(f"no such folder: {written.name}", NAME)
    options = {"trust_remote_code": written.trust_remote_code, "revision": written.revision or "main"}
    with quiet(), explained(written):
        if written.config is None:
            config = transformers.AutoConfig.from_pretrained(location, **options)
        else:
            config = transformers.AutoConfig.for_model(**written.config)
        spec.task.configure(config, written.labels)
        set_seed(spec.train.seed)
        if meta and (written.config is not None or _no_weights(location)):
            return _shapes(spec, config)
        model, info = getattr(transformers, spec.task.auto).from_pretrained(
            location,
            config=config,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            dtype=getattr(torch, written.dtype),
            device_map="meta" if meta else None,
            **options,
        )
    model.eval()
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    names = {name for name, _ in model.named_parameters()}
    new = frozenset(names & (set(info["missing_keys"]) | mismatched))
    foreign = [name for name in sorted(mismatched) if name.startswith(f"{model.base_model_prefix}.")]
    if foreign:
        raise SpecError(f"the weights of {written.name} do not fit its config: {foreign[0]} has another shape", NAME)
    # A head that a checkpoint lacks is made on purpose; one of another name in it is none of the base model's.
    own = {name for name in names if not spec.task.headed or name.startswith(f"{model.base_model_prefix}.")}
    for name in sorted(new & own):
        if wrapped := [key for key in info["unexpected_keys"] if key.endswith(f".{name}")]:
            said = f"{len(new & own)} of {len(own)} weights of {written.name} are missing"
            lead = wrapped[0].removesuffix(name)
            raise SpecError(f"{said}: its names start with {lead!r}; save it without that", NAME)
    return _pretrained(spec, model, new)


def _pretrained(spec: Spec, model: nn.Module, new: frozenset[str]) -> Pretrained:
    with quiet():
        module = spec.task.module(model, spec.model.revision)
    return Pretrained(model, new, spec.task.labels(model.config), module)


def _no_weights(location: str) -> bool:
    """Whether a local folder holds a config alone."""
    return is_local(location) and not any(name.endswith(".safetensors") for name in os.listdir(location))


def _shapes(spec: Spec, config: transformers.PreTrainedConfig) -> Pretrained:
    """The model of a config on the meta device; where the task has a head, what is outside the base model is new."""
    with torch.device("meta"):
        auto = getattr(transformers, spec.task.auto)
        model = auto.from_config(config, trust_remote_code=spec.model.trust_remote_code)
    model = model.to(getattr(torch, spec.model.dtype)).eval()
    base = f"{model.base_model_prefix}."
    names = (name for name, _ in model.named_parameters() if spec.task.headed and not name.startswith(base))
    return _pretrained(spec, model, frozenset(names))


def load_processor(spec: Spec, folder: str | None = None):
    """The tokenizer of the spec's model, or what else its task reads inputs by.

    Args:
        folder: read it from here instead.

    Raises:
        SpecError: there is none.
    """
    auto = getattr(transformers, spec.task.processor)
    options = {"trust_remote_code": spec.model.trust_remote_code, "revision": spec.model.revision or "main"}
    with quiet(), explained(spec.model, "tokenizer or processor"):
        processor = auto.from_pretrained(folder or resolve(spec.model.name, NAME), **options)
        if getattr(processor, "pad_token", "") is None:
            processor.pad_token = processor.eos_token
    return processor


def collator(spec: Spec, pretrained: Pretrained, processor: Any, names: Sequence[str]) -> Collate:
    """A function from encoded rows to a batch for a model that reads `names`; as `Task.collator`."""
    start = getattr(pretrained.model.config, "decoder_start_token_id", None)
    return spec.task.collator(processor, names, start)


@contextlib.contextmanager
def explained(written: Model, what: str = "model") -> Iterator[None]:
    """Turn what transformers raises on loading into one line about `model.name`."""
    try:
        yield
    except (SubspanError, KeyboardInterrupt):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            message = f"{written.name} brings Python code of its own; set model.trust_remote_code: true to run it"
        else:
            message = f"can't load the {what} {written.name}: {reason(error)}"
        path = ("model", "config") if written.config is not None and what == "model" else NAME
        raise (UnreachableError if _unreachable(error) else SpecError)(message, path) from error


def _unreachable(error: BaseException | None) -> bool:
    while error and not isinstance(error, LocalEntryNotFoundError | ConnectionError):
        error = error.__cause__
    return error is not None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers' reports off: the plan says what is new, tuned and frozen."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def save_model(pretrained: Pretrained, folder: str) -> None:
    """Write the model as `from_pretrained` reads it: config and safetensors."""
    with quiet():
        pretrained.model.save_pretrained(folder)


def for_onnx(model: nn.Module) -> nn.Module:
    """The model in float32 and with its experts, if any, as batched products: ONNX has no grouped ones. In place."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    return model.float()


def example_inputs(model: nn.Module, task: str | Task, batch: int = 3, length: int = 11) -> Inputs:
    """Examples of what a model of a task reads, on the model's device, with dynamic batch and sequence.

    Args:
        task: its name, or the task itself.
        batch, length: sizes of the examples.
    """
    return (task_of(task) if isinstance(task, str) else task).inputs(model, batch, length)


def positions(model: nn.Module) -> int | None:
    """How many tokens a model has a position for; None where positions are relative or computed."""
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and re.search(r"(^|[._])(positions?|position_embeddings?|wpe)$", name)
    ]
    return min(
        (
            t.num_embeddings - getattr(t, "offset", 0) - (0 if t.padding_idx is None else t.padding_idx + 1)
            for t in tables
        ),
        default=None,
    )
