"""What a base model's folder holds, before anything of it is loaded: safetensors, of one type, inside the folder."""

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import transformers
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils import logging as hf_logging

from .errors import SpecError, SubspanError
from .files import read_json
from .resources import is_local

NAME = ("model", "name")
BITSANDBYTES, COMPRESSED, GPTQ, AWQ, FINE_GRAINED = "bitsandbytes", "compressed-tensors", "gptq", "awq", "fp8"
_FEW_BITS = (BITSANDBYTES, COMPRESSED, GPTQ, AWQ, FINE_GRAINED)
_INDEX = "model.safetensors.index.json"
GGUF = ".gguf"
_OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", GGUF, ".pkl", ".npz")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WHOLE = ("BOOL", "I16", "U16", "I32", "U32", "I64", "U64")
_QUANTISED = ("I8", "U8", "F8", "F4", "F6", "U4", "I4")
_MOST_LAYERS = 4096
_MEANING = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "preprocessor_config.json", "processor_config.json", "1_Pooling/config.json",
)  # fmt: skip
_WRITER = ("_name_or_path", "name_or_path", "transformers_version")


def check_config(config: Mapping[str, Any], path: tuple[str, ...]) -> None:
    """Refuse what a config asks for beside the model: a quantised base, code from a hub, a size that is no model's.

    Args:
        config: as in config.json.
        path: place in the spec.

    Raises:
        SpecError: naming the key.
    """
    for keys, value in _entries(config):
        key = keys[-1]
        if key == "quantization_config" and value:
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            if method not in _FEW_BITS or path != NAME:
                said = f"the base model is quantised ({method or 'quantization_config'}), which is not supported"
                others = f"or as {', '.join(_FEW_BITS[:-1])} or {_FEW_BITS[-1]} stores it"
                raise SpecError(f"{said}; give it in float32, bfloat16, float16, {others}", path)
        if key.endswith("_implementation") and "/" in str(value):
            said = f"{'.'.join(keys)}: {value!r} asks for code of a hub, which is not run; take the key out"
            raise SpecError(said, path)
        if "layers" in key and isinstance(value, int) and value > _MOST_LAYERS:
            raise SpecError(f"{'.'.join(keys)}: {value} is more layers than any model has ({_MOST_LAYERS})", path)


def _entries(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys, value) of everything in nested mappings; deeper than any config goes is not followed."""
    if isinstance(value, Mapping) and len(keys) < 20:
        for key, one in value.items():
            yield (*keys, str(key)), one
            yield from _entries(one, (*keys, str(key)))


@contextlib.contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """transformers' reports off: the plan says what is new, tuned and frozen.

    Args:
        bars: leave its progress bars.
    """
    level, shown = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    if not bars:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if shown:
            hf_logging.enable_progress_bar()


def config_of(location: str, revision: str) -> dict[str, Any]:
    """config.json of a folder or of a hub id."""
    return transformers.PreTrainedConfig.get_config_dict(location, revision=revision)[0]


def stored(location: str, revision: str, quantised: bool = False) -> dict[str, tuple[str, int]] | None:
    """Name -> type, as safetensors calls it, and number of entries of a base model's weights; empty where its folder
    holds a config alone, None for a hub id.

    Args:
        quantised: its config says that they are in few bits.

    Raises:
        SpecError: its weights are no safetensors, lie elsewhere, are broken, or quantised though nothing says how.
    """
    there = places(location, revision)
    if there is None:
        return None
    found: dict[str, tuple[str, int]] = {}
    for name, place in there.items():
        few = place.dtype.startswith(_QUANTISED) and place.dtype not in _DTYPES and place.dtype not in _WHOLE
        if few and not quantised:
            said = f"{name} of the base model is stored in {place.dtype}, and its config does not say how"
            raise SpecError(said, NAME)
        found[name] = place.dtype, math.prod(place.shape)
    return found


class Place(NamedTuple):
    """Where a tensor of a base model is, its type as safetensors calls it, and its shape."""

    file: Path
    dtype: str
    shape: list[int]


def places(location: str, revision: str) -> dict[str, Place] | None:
    """Name -> place of every tensor of a base model; empty where its folder holds a config alone, None for a hub id.

    Raises:
        SpecError: its weights are no safetensors, lie elsewhere, or are broken.
    """
    files = weight_files(location, revision)
    if files is None:
        return None
    found: dict[str, Place] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, "pt") as held:
                for name in held.keys():  # noqa: SIM118 - no mapping
                    part = held.get_slice(name)
                    found[name] = Place(file, part.get_dtype(), part.get_shape())
        except (OSError, safetensors.SafetensorError) as error:
            raise SpecError(f"{file}: truncated, or not a safetensors file ({error})", NAME) from None
    return found


def own_type(held: Mapping[str, tuple[str, int]] | None) -> str | None:
    """The type that most of a base model's weights have; None where there are none, "auto" (what transformers finds)
    for a hub id.

    Args:
        held: from `stored`.
    """
    if held is None:
        return "auto"
    sizes: dict[str, int] = {}
    for dtype, size in held.values():
        if dtype in _DTYPES:
            sizes[dtype] = sizes.get(dtype, 0) + size
    return _DTYPES[max(sizes, key=sizes.__getitem__)] if sizes else None


def others(held: Mapping[str, tuple[str, int]] | None, dtype: str) -> dict[str, int]:
    """Type -> how many weights have it, of those that are stored in another floating type than `dtype`."""
    found: dict[str, int] = {}
    for one, _ in (held or {}).values():
        if _DTYPES.get(one, dtype) != dtype:
            found[_DTYPES[one]] = found.get(_DTYPES[one], 0) + 1
    return found


def whole_numbers(held: Mapping[str, tuple[str, int]] | None) -> list[str]:
    """Names of what is stored in whole numbers or truth values; from `stored`."""
    return [name for name, (dtype, _) in (held or {}).items() if dtype in _WHOLE]


def identity(location: str, revision: str) -> dict[str, str]:
    """SHA-256 of the files that say what a model's weights and ids mean, by name: config, tokenizer, image processor.

    JSON is compared by its content, less what only says where and by which version it was written.
    """
    found = {}
    for name in _MEANING:
        cached = None if is_local(location) else try_to_load_from_cache(location, name, revision=revision)
        place = Path(location) / name if is_local(location) else cached
        if isinstance(place, str | Path) and Path(place).is_file():
            data = Path(place).read_bytes()
            with contextlib.suppress(ValueError, AttributeError):
                content = {key: value for key, value in json.loads(data).items() if key not in _WRITER}
                data = json.dumps(content, sort_keys=True).encode()
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def weight_files(location: str, revision: str) -> list[Path] | None:
    """The safetensors files of a base model on disk; none where there is a config alone; None for a hub id."""
    if not is_local(location):
        with contextlib.suppress(EntryNotFoundError):
            _parts(Path(hf_hub_download(location, _INDEX, revision=revision)))
        return None
    folder = Path(location)
    if (folder / "adapter_config.json").is_file():
        raise SpecError("the folder holds an adapter of another library; merge it into a model first", NAME)
    if (folder / _INDEX).is_file() and not (folder / "model.safetensors").is_file():
        files = [folder / name for name in _parts(folder / _INDEX)]
        if missing := [file.name for file in files if not file.is_file()]:
            raise SpecError(f"{folder / _INDEX} names {missing[0]}, which is not there", NAME)
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    others = sorted(file.name for file in folder.iterdir() if file.name.endswith((*_OTHERS, ".safetensors")))
    if others and others[0].endswith(GGUF):
        raise SpecError(f"its weights are in a GGUF file; set model.gguf: {others[0]}", NAME)
    if others:
        said = f"its weights are in {others[0]}, not in model.safetensors; save it with transformers' save_pretrained"
        raise SpecError(said, NAME)
    return []


def _parts(index: Path) -> list[str]:
    """The files that an index names: safetensors beside it, and nothing else."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (AttributeError, KeyError, SubspanError, TypeError) as error:
        raise SpecError(f"{index}: no index of weights ({error})", NAME) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise SpecError(f"{index} names {name!r}: only safetensors files of the same folder are read", NAME)
    return names
