"""The pretrained model that a spec names, through transformers: on the meta device for plans, with weights for runs."""

import contextlib
import inspect
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers.utils import logging as hf_logging

from .errors import SpecError, SubspanError, UnreachableError, reason
from .graph.traced import Inputs
from .resources import is_local, resolve
from .spec import Model, Spec

AUTO = {
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
    "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
    "image-classification": transformers.AutoModelForImageClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
}
NAME = ("model", "name")


@dataclass
class Pretrained:
    """A Hugging Face model, the names of its newly made parameters (a head, usually), and its class names in order."""

    model: nn.Module
    new: frozenset[str]
    labels: list[str] = field(default_factory=list)


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
        _configure(config, written)
        transformers.set_seed(spec.train.seed)
        if meta and (written.config is not None or _no_weights(location)):
            return _shapes(written, config)
        model, info = AUTO[written.task].from_pretrained(
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
    return Pretrained(model, new, _labels(written, model))


def _labels(written: Model, model: nn.Module) -> list[str]:
    count = model.config.num_labels if "classification" in written.task else 0
    return [model.config.id2label[i] for i in range(count)]


def _no_weights(location: str) -> bool:
    """Whether a local folder holds a config alone."""
    return is_local(location) and not any(name.endswith(".safetensors") for name in os.listdir(location))


def _shapes(written: Model, config: transformers.PreTrainedConfig) -> Pretrained:
    """The model of a config on the meta device; of classifiers, what is outside the base model is new."""
    with torch.device("meta"):
        model = AUTO[written.task].from_config(config, trust_remote_code=written.trust_remote_code)
    model = model.to(getattr(torch, written.dtype)).eval()
    headed = "classification" in written.task or written.task == "regression"
    base = f"{model.base_model_prefix}."
    new = frozenset(name for name, _ in model.named_parameters() if headed and not name.startswith(base))
    return Pretrained(model, new, _labels(written, model))


def _configure(config: transformers.PreTrainedConfig, written: Model) -> None:
    if written.task == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    elif "classification" in written.task and written.labels:
        config.id2label = dict(enumerate(written.labels))
        config.label2id = {label: i for i, label in enumerate(written.labels)}
        config.problem_type = "single_label_classification" if written.task == "sequence-classification" else None
    if written.task == "sequence-classification" and config.pad_token_id is None:
        eos = config.eos_token_id
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos


def load_processor(spec: Spec, folder: str | None = None):
    """The tokenizer of the spec's model, or the image processor for image tasks.

    Args:
        folder: read it from here instead.

    Raises:
        SpecError: there is none.
    """
    auto = transformers.AutoImageProcessor if spec.model.task == "image-classification" else transformers.AutoTokenizer
    options = {"trust_remote_code": spec.model.trust_remote_code, "revision": spec.model.revision or "main"}
    with quiet(), explained(spec.model, "tokenizer or processor"):
        processor = auto.from_pretrained(folder or resolve(spec.model.name, NAME), **options)
        if getattr(processor, "pad_token", "") is None:
            processor.pad_token = processor.eos_token
    return processor


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


def example_inputs(model: nn.Module, task: str, batch: int = 3, length: int = 11) -> Inputs:
    """Examples of what a model of a task reads, on the model's device, with dynamic batch and sequence.

    Token ids are (batch, sequence) int64, pixels (batch, channels, height, width) in the model's dtype.

    Args:
        batch, length: sizes of the examples. A decoder's sequence is shorter, so that no two sizes are equal.
    """
    parameter, config = next(model.parameters()), model.config
    if task == "image-classification":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        pixels = torch.zeros(batch, config.num_channels, height, width, dtype=parameter.dtype, device=parameter.device)
        return Inputs(kwargs={"pixel_values": pixels}, dynamic={"pixel_values": {0: "batch"}})
    lengths = {"input_ids": length, "attention_mask": length}
    if getattr(config, "type_vocab_size", 0) > 1 and "token_type_ids" in inspect.signature(model.forward).parameters:
        lengths["token_type_ids"] = length
    if task == "seq2seq-lm":
        lengths["decoder_input_ids"] = length - 4 if length > 8 else length + 1
    kwargs = {
        name: torch.full((batch, n), int(name == "attention_mask"), dtype=torch.long, device=parameter.device)
        for name, n in lengths.items()
    }
    axes = {n: {0: "batch", 1: "decoder_sequence" if n.startswith("decoder") else "sequence"} for n in kwargs}
    return Inputs(kwargs=kwargs, dynamic=axes)


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


def example_batch(model: nn.Module, task: str, batch: int, length: int) -> dict[str, torch.Tensor]:
    """A batch as a training step reads it: `example_inputs` and labels."""
    inputs = example_inputs(model, task, batch, length).kwargs
    if task == "seq2seq-lm":
        inputs["decoder_input_ids"] = inputs["input_ids"].clone()
    like = {"token-classification": "input_ids", "causal-lm": "input_ids", "seq2seq-lm": "decoder_input_ids"}
    device = next(model.parameters()).device
    size = inputs[like[task]].shape if task in like else (batch,)
    labels = torch.zeros(size, dtype=torch.float32 if task == "regression" else torch.long, device=device)
    return {**inputs, "labels": labels}
