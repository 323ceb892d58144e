"""The pretrained model that a spec names, through transformers: on the meta device for plans, with weights for runs."""

import contextlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from accelerate.utils import set_seed
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from .algebra import Format
from .base import NAME, check_config, config_of, others, own_type, quiet, stored, whole_numbers
from .errors import SpecError, SubspanError, UnreachableError, reason
from .gguf import location_of
from .graph.traced import Inputs, released
from .packed import Held, in_few_bits
from .quantise import LeftOut, adopt, quantise
from .resources import is_local
from .spec import Model, Spec
from .tasks import Task, task_of
from .tasks.base import Collate


@dataclass
class Pretrained:
    """A Hugging Face model, and what its task makes of it.

    Attributes:
        model: as transformers loads it.
        new: names of its newly made parameters (a head, usually).
        missing: those of them that are no head: a base model's that its checkpoint lacks.
        labels: class names in order; empty for tasks without classes.
        module: what is traced and exported, with the same parameters.
        processor: the tokenizer or the image processor; None where a spec names a config alone.
        notes: what there is to say of its weights.
    """

    model: nn.Module
    new: frozenset[str]
    missing: frozenset[str]
    labels: list[str]
    module: nn.Module
    processor: Any
    notes: tuple[str, ...] = ()


def load_model(spec: Spec, meta: bool = False) -> Pretrained:
    """Load the model of a spec with its tokenizer or image processor; new parameters are drawn with the spec's seed.

    Only safetensors files of the model's own folder are read.

    Args:
        meta: shapes alone, on the meta device; no weight is read.

    Raises:
        SpecError: the model can't be found or loaded, its files are none that are read, its head does not fit the task,
            or it does not fit its tokenizer.
    """
    written = spec.model
    location, revision = location_of(written), written.revision or "main"
    written_out = meta and written.config is not None
    if not written_out and is_local(location) and not os.path.isdir(location):
        raise SpecError(f"no such folder: {written.name}", NAME)
    options = {"trust_remote_code": written.trust_remote_code, "revision": revision}
    with quiet(), explained(written):
        config = _config(written, location, options)
        forms, read = _stored_forms(written, config, location, revision)
        named = spec.task.labels(config)
        spec.task.configure(config, written.labels)
        set_seed(spec.train.seed)
        held = {} if written_out else stored(location, revision, bool(forms))
        own = own_type(held and {name: one for name, one in held.items() if name not in forms})
        if meta and own is None:
            return _shapes(spec, config)
        processor = _processor(spec, location)
        before = getattr(config, "pad_token_id", None)
        if spec.task.headed:
            name_padding(config, processor)
        dtype = written.dtype or own or config.dtype or "float32"
        model, info = getattr(transformers, spec.task.auto).from_pretrained(
            location,
            config=config,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            dtype=dtype if dtype == "auto" else _type(dtype),
            device_map="meta" if meta else None,
            quantization_config=LeftOut(forms) if forms else None,
            **options,
        )
    model.eval()
    adopted = adopt(model, forms, None if meta else read)
    info["mismatched_keys"] = [one for one in info["mismatched_keys"] if one[0] not in adopted]
    info["missing_keys"] = set(info["missing_keys"]) - adopted
    info["unexpected_keys"] = set(info["unexpected_keys"]) - forms.keys()
    new, missing = _made(spec, model, info, [name for name in whole_numbers(held) if name not in forms])
    if spec.task.headed and not new - missing:
        check_order(written, named)
    if not meta:
        check_finite(written.name, model)
    if processor is not None:
        check_processor(model, processor, before)
    kept = quantised(spec, model, new)
    found = _pretrained(spec, model, new, missing, processor)
    found.notes = (*_cast(written, held, str(dtype).removeprefix("torch.")), *kept)
    return found


def _config(written: Model, location: str, options: Mapping[str, Any]) -> transformers.PreTrainedConfig:
    if written.config is not None:
        check_config(written.config, ("model", "config"))
        return transformers.AutoConfig.for_model(**written.config)
    check_config(config_of(location, options["revision"]), NAME)
    return transformers.AutoConfig.from_pretrained(location, **options)


def _type(dtype: str | torch.dtype) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def _stored_forms(
    written: Model, config: transformers.PreTrainedConfig, location: str, revision: str
) -> tuple[dict[str, Format], Held | None]:
    """How a checkpoint that says so has its weights in few bits, by their names in it, and what reads one; its config
    says nothing of that then.

    Raises:
        SpecError: they can't be read, or `model.quantise` asks for other bits.
    """
    section = getattr(config, "quantization_config", None)
    if section is None:
        return {}, None
    if written.quantise is not None:
        raise SpecError("the base model is stored in few bits already; take the key out", ("model", "quantise"))
    del config.quantization_config
    return in_few_bits(section, location, revision)


def quantised(spec: Spec, model: nn.Module, new: Collection[str]) -> tuple[str, ...]:
    """Store the base model in few bits, where the spec says so; heads stay as they are. In place.

    Args:
        new: names of newly made parameters.

    Raises:
        SpecError: as `quantise`.
    """
    how, base = spec.model.quantise, f"{model.base_model_prefix}."
    if how is None:
        return ()
    heads = (name for name, _ in model.named_parameters() if spec.task.headed and not name.startswith(base))
    return quantise(model, how, {*new, *heads})


def _cast(written: Model, held: Mapping[str, tuple[str, int]] | None, dtype: str) -> tuple[str, ...]:
    """A sentence for each type of stored weights that become another one though nobody asked for it."""
    found = others(held, dtype) if written.dtype is None else {}
    said = f"weights of {written.name} are stored in"
    return tuple(f"{n} {said} {one} and become {dtype}; model.dtype: {one} keeps them" for one, n in found.items())


def check_order(written: Model, own: Sequence[str]) -> None:
    """Refuse names of labels in another order than a head that was trained has them.

    Args:
        own: class names of the checkpoint's config, in order.

    Raises:
        SpecError: at `model.labels`.
    """
    given = [label.lower() for label in written.labels or ()]
    trained = [str(label).lower() for label in own]
    if given != trained and sorted(given) == sorted(trained):
        said = f"the head of {written.name} was trained with the labels in another order, {', '.join(map(str, own))}"
        raise SpecError(f"{said}; write them so", ("model", "labels"))


def check_finite(name: str, model: nn.Module) -> None:
    """Refuse a base model with a weight that is not finite.

    Raises:
        SpecError: with the first of them.
    """
    for one, value in model.state_dict().items():
        if value.is_floating_point() and value.numel() and not torch.isfinite(torch.stack(value.aminmax())).all():
            raise SpecError(f"{one} of {name} is not finite: the checkpoint is broken", NAME)


def _made(
    spec: Spec, model: nn.Module, info: Mapping[str, Any], whole: Collection[str]
) -> tuple[frozenset[str], frozenset[str]]:
    """Newly made parameters, and those of the base model among them.

    Args:
        whole: what the checkpoint stores in whole numbers.

    Raises:
        SpecError: a weight of the checkpoint has another shape or another name, is no floating one, or is of a layer
            that the config lacks; or it lacks statistics that the model keeps.
    """
    name, base = spec.model.name, f"{model.base_model_prefix}."
    mismatched, names = {entry[0] for entry in info["mismatched_keys"]}, {name for name, _ in model.named_parameters()}
    new = frozenset(names & (set(info["missing_keys"]) | mismatched))
    # A head that a checkpoint lacks is made on purpose; one of another name in it is none of the base model's.
    own = {one for one in names if not spec.task.headed or one.startswith(base)}
    if foreign := sorted(mismatched & own):
        raise SpecError(f"the weights of {name} do not fit its config: {foreign[0]} has another shape", NAME)
    for one in sorted(new & own):
        end = f".{one.removeprefix(base)}"
        if wrapped := [key for key in info["unexpected_keys"] if key.endswith(end)]:
            said = f"{len(new & own)} of {len(own)} weights of {name} are missing"
            lead = wrapped[0].removesuffix(one) if wrapped[0].endswith(f".{one}") else wrapped[0].removesuffix(end[1:])
            raise SpecError(f"{said}: its names start with {lead!r}; save it without that", NAME)
    for key in whole:
        if names & {key, f"{base}{key}", key.removeprefix(base)}:
            said = f"{key} of {name} is stored in whole numbers"
            raise SpecError(f"{said}; give it in float32, bfloat16 or float16", NAME)
    kept = {key for key, value in model.state_dict().items() if value.is_floating_point()} - names
    if lacking := sorted(kept & set(info["missing_keys"])):
        said = f"{len(lacking)} statistics of {name} are missing, e.g. {lacking[0]}: they would not be its own"
        raise SpecError(f"{said}; give a checkpoint that holds them", NAME)
    numbered = {_NUMBER.sub("#", one) for one in names}
    for key in info["unexpected_keys"]:
        more = _NUMBER.sub("#", key)
        if "#" in more and numbered & {more, f"{base}{more}", more.removeprefix(base)}:
            raise SpecError(f"{name} has weights of more layers than its config: {key}", NAME)
    return new, new & own


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def check_missing(name: str, pretrained: Pretrained, used: Collection[str]) -> None:
    """Refuse a base model that lacks weights which its forward reads.

    Args:
        used: names of the parameters that the traced graphs read.

    Raises:
        SpecError: with the first of them.
    """
    if lacking := sorted(pretrained.missing & set(used)):
        total = sum(1 for one in pretrained.model.parameters()) - len(pretrained.new - pretrained.missing)
        said = f"{len(lacking)} of {total} weights of {name} are missing, e.g. {lacking[0]}: they would be random"
        raise SpecError(f"{said}; give a checkpoint that holds them", NAME)


def _pretrained(
    spec: Spec, model: nn.Module, new: frozenset[str], missing: frozenset[str], processor: Any
) -> Pretrained:
    with quiet():
        module = spec.task.module(model, spec.model.revision)
    return Pretrained(model, new, missing, spec.task.labels(model.config), module, processor)


def _shapes(spec: Spec, config: transformers.PreTrainedConfig) -> Pretrained:
    """The model of a config on the meta device; where the task has a head, what is outside the base model is new."""
    if spec.task.headed:
        name_padding(config, None)
    with torch.device("meta"):
        auto = getattr(transformers, spec.task.auto)
        model = auto.from_config(config, trust_remote_code=spec.model.trust_remote_code)
    dtype = spec.model.dtype or config.dtype or "float32"
    model = model.to(_type(dtype)).eval()
    base = f"{model.base_model_prefix}."
    names = frozenset(name for name, _ in model.named_parameters() if spec.task.headed and not name.startswith(base))
    kept = quantised(spec, model, names)
    found = _pretrained(spec, model, names, frozenset(), None)
    found.notes = kept
    return found


def _processor(spec: Spec, location: str) -> Any:
    """The model's tokenizer or image processor; None for a spec without data whose model has none."""
    if spec.data is None and is_local(location):
        try:
            return load_processor(spec)
        except SpecError:
            return None
    return load_processor(spec)


def processor_of(spec: Spec, pretrained: Pretrained) -> Any:
    """The processor that a model was loaded with, or else the one that a run would load.

    Raises:
        SpecError: as `load_processor`.
    """
    return pretrained.processor if pretrained.processor is not None else load_processor(spec)


def has_processor(spec: Spec) -> bool:
    """Whether the model is a folder with a file of a tokenizer, or of what else inputs are read by."""
    place = Path(location_of(spec.model))
    return any(any(place.glob(name)) for name in ("*token*", "*processor*", "vocab*", "*.gguf"))


def load_processor(spec: Spec, folder: str | None = None):
    """The tokenizer of the spec's model, or what else its task reads inputs by, set as the task reads.

    Args:
        folder: read it from here instead.

    Raises:
        SpecError: there is none, or the task can't read by it.
    """
    auto = getattr(transformers, spec.task.processor)
    options = {"trust_remote_code": spec.model.trust_remote_code, "revision": spec.model.revision or "main"}
    place = folder or location_of(spec.model)
    with quiet(), explained(spec.model, "tokenizer or processor"):
        processor = auto.from_pretrained(place, **options)
    if hasattr(processor, "pad_token"):
        check_vocabulary(processor, place, spec.model.name)
        if "attention_mask" not in processor.model_input_names:
            processor.model_input_names = [*processor.model_input_names, "attention_mask"]
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token
        if processor.pad_token is None:
            said = f"the tokenizer of {spec.model.name} has no token to pad with, and none for the end"
            raise SpecError(f"{said}: give its tokenizer_config.json a pad_token, or an eos_token", NAME)
    if spec.data and spec.data.template is not None and folder is None:
        processor.chat_template = spec.data.template
    spec.task.settle(processor)
    return processor


def check_vocabulary(processor: Any, place: str, name: str) -> None:
    """Refuse a tokenizer that was made up, since its folder holds no vocabulary.

    Raises:
        SpecError: naming the files.
    """
    files = sorted({*processor.vocab_files_names.values(), "tokenizer.json"} if processor.vocab_files_names else ())
    if files and is_local(place) and not any(os.path.exists(os.path.join(place, file)) for file in files):
        raise SpecError(f"{name} holds no tokenizer: none of {', '.join(files)}", NAME)


def name_padding(config: Any, processor: Any) -> None:
    """Put the tokenizer's padding token into a config: a head that reads the last token looks for the padding after it.

    Without a tokenizer a config that has none gets its end token.
    """
    before, eos = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    if processor is None and before is None:
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    elif processor is not None and hasattr(processor, "pad_token_id"):
        config.pad_token_id = config.get_text_config().pad_token_id = processor.pad_token_id


def check_processor(model: nn.Module, processor: Any, before: int | None) -> None:
    """Refuse a tokenizer whose ids the model has no row for, or whose padding moves positions.

    Args:
        before: the padding token of the model's own config.

    Raises:
        SpecError: naming ids and tokens.
    """
    if not hasattr(processor, "get_vocab"):
        return
    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except NotImplementedError:  # Of characters, that have no table.
        return
    over = sorted((number, token) for token, number in processor.get_vocab().items() if number >= rows)
    if over:
        shown = ", ".join(f"{number} ({token})" for number, token in over[:3])
        some = "id" if len(over) == 1 else "ids"
        raise SpecError(f"the tokenizer's {some} {shown} have no row in the model's table of {rows}", NAME)
    counted = any(table.padding_idx is not None for table in _tables(model))
    if counted and before is not None and before != processor.pad_token_id:
        said = f"the tokenizer pads with {processor.pad_token_id}, but the model counts positions from its config's"
        raise SpecError(f"{said} pad_token_id, {before}", NAME)


def collator(spec: Spec, pretrained: Pretrained, names: Sequence[str]) -> Collate:
    """A function from encoded rows to a batch for a model that reads `names`; as `Task.collator`."""
    start = getattr(pretrained.model.config, "decoder_start_token_id", None)
    return spec.task.collator(pretrained.processor, names, start)


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


def save_model(pretrained: Pretrained, folder: str) -> None:
    """Write the model as `from_pretrained` reads it: config and safetensors.

    Raises:
        OSError: no space, no permission.
    """
    with quiet():
        try:
            pretrained.model.save_pretrained(folder)
        except safetensors.SafetensorError as error:
            raise OSError(f"can't write {folder}: {error}") from None


def set_ends(model: nn.Module, ends: Sequence[int]) -> None:
    """Let a model stop at these tokens too, and at those that its config or its settings for writing name. In place."""
    configs = [one for one in (model.config, getattr(model, "generation_config", None)) if one is not None]
    own = [_listed(getattr(config, "eos_token_id", None)) for config in configs]
    every = list(dict.fromkeys([*(one for some in own for one in some), *ends]))
    for config, some in zip(configs, own, strict=True):
        if set(every) - set(some):
            config.eos_token_id = every


def ends_of(config: Any, processor: Any) -> set[int]:
    """The tokens that end what a model writes: its config's, or else its tokenizer's."""
    return set(_listed(config.eos_token_id) or _listed(processor.eos_token_id))


def _listed(tokens: int | list[int] | None) -> list[int]:
    return tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]


def save_processor(processor: Any, folder: str | Path, task: Task) -> None:
    """Write a tokenizer or an image processor; for a decoder, whose rows grow, one that pads on the left.

    Raises:
        OSError: no space, no permission.
    """
    side = getattr(processor, "padding_side", None)
    if task.decodes:
        processor.padding_side = "left"
    try:
        processor.save_pretrained(folder)
    finally:
        if task.decodes:
            processor.padding_side = side


def for_onnx(model: nn.Module) -> nn.Module:
    """The model in float32 and with its experts, if any, as batched products: ONNX has no grouped ones. In place."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            stored = tensor.data
            tensor.data = stored.float()
            released(stored)
    return model


def example_inputs(model: nn.Module, task: str | Task, batch: int = 3, length: int = 11) -> Inputs:
    """Examples of what a model of a task reads, on the model's device, with dynamic batch and sequence.

    Args:
        task: its name, or the task itself.
        batch, length: sizes of the examples.
    """
    return (task_of(task) if isinstance(task, str) else task).inputs(model, batch, length)


def positions(model: nn.Module) -> int | None:
    """How many tokens a model has a position for; None where positions are relative or computed."""
    return min(
        (
            t.num_embeddings - getattr(t, "offset", 0) - (0 if t.padding_idx is None else t.padding_idx + 1)
            for t in _tables(model)
        ),
        default=None,
    )


def _tables(model: nn.Module) -> list[nn.Embedding]:
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and re.search(r"(^|[._])(positions?|position_embeddings?|wpe)$", name)
    ]
