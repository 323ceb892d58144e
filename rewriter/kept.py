"""Traces on disk: what `torch.export` finds of a model is found once per model and version of the code."""

import contextlib
import enum
import hashlib
import inspect
import json
import sys
import types
from collections.abc import Collection
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .files import aside, cache_folder, digest
from .graph.stored import Trace, from_text, to_text
from .graph.traced import Inputs

_KEY = "trace"
# Of how a module was loaded, not of what it computes.
_LOADED = {"generation_config", "_name_or_path", "_commit_hash", "_is_hf_initialized", "hf_device_map"}
_APART = {"_parameters", "_buffers", "_modules", "training", *_LOADED}
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)


def key_of(model: nn.Module, inputs: Inputs, mode: str, without: Collection[str]) -> str | None:
    """What a trace is found by: the modules with all that they hold but the values of tensors, their code and ours,
    the inputs' shapes, and versions. None where something decides what a forward does that has no name.
    """
    try:
        modules = [[name, *_module(one)] for name, one in model.named_modules(remove_duplicate=False)]
        leaves, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
        given = [str(spec), [_tensor(one) for one in leaves], _described(dict(inputs.dynamic))]
    except ValueError:
        return None
    first: dict[int, str] = {}
    tensors = [
        [name, first.setdefault(id(one), name), *_tensor(one)]
        for some in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        for name, one in some
    ]
    versions = [sys.version, torch.__version__, version("transformers"), str(torch.get_default_dtype()), _own()]
    whole = json.dumps([versions, mode, sorted(without), given, tensors, modules])
    return hashlib.sha256(whole.encode()).hexdigest()


def _tensor(one: torch.Tensor) -> list[Any]:
    if not isinstance(one, torch.Tensor):
        raise ValueError
    device = "cpu" if one.device.type == "meta" else one.device.type
    return [list(one.shape), list(one.stride()), str(one.dtype), device, one.requires_grad]


def _module(one: nn.Module) -> list[Any]:
    if any(value for name, value in vars(one).items() if name.endswith("_hooks") and name.startswith("_")):
        raise ValueError
    own = {name: value for name, value in vars(one).items() if name not in _APART and not name.endswith("_hooks")}
    return [[f"{kind.__module__}.{kind.__qualname__}" for kind in type(one).__mro__], _code(type(one)), _described(own)]


@lru_cache
def _code(kind: type) -> list[str]:
    """Digests of the files that a class comes from, torch's apart."""
    found = {}
    for one in kind.__mro__:
        if one is object or one.__module__.partition(".")[0] in ("torch", "abc", "typing"):
            continue
        try:
            file = inspect.getsourcefile(one)
        except TypeError:
            file = None
        if file is None or not Path(file).is_file() or "<locals>" in one.__qualname__:
            raise ValueError
        found[file] = _digest(file)
    return sorted(found.values())


@lru_cache
def _digest(file: str) -> str:
    return digest(Path(file))


@lru_cache
def _own() -> str:
    """A digest of this package's code."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()


def _described(value: Any) -> Any:
    """A value as JSON has it.

    Raises:
        ValueError: it has no name that tells it from another one.
    """
    from transformers import PreTrainedConfig

    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, list | tuple | set | frozenset):
        parts = [_described(one) for one in value]
        return sorted(parts, key=str) if isinstance(value, set | frozenset) else parts
    if isinstance(value, dict):
        return [[repr(key), _described(one)] for key, one in value.items() if key not in _APART]
    if isinstance(value, PreTrainedConfig):
        return [type(value).__qualname__, _described(vars(value))]
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type) and "<" not in value.__qualname__:
        return f"{value.__module__}.{value.__qualname__}"
    raise ValueError


def load(key: str, inputs: Inputs) -> Trace | None:
    """The trace of a key, with shapes on the CPU; None where there is none, or one that can't be read."""
    file = _file(key)
    try:
        with safe_open(file, "pt") as held:
            constants = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
            return from_text(held.metadata()[_KEY], inputs, constants)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        return None


def save(key: str, trace: Trace, inputs: Inputs) -> None:
    """Keep a trace, if it has a text that says all of it; a folder that can't be written is passed over."""
    try:
        text = to_text(trace)
        again = from_text(text, inputs, trace.constants)
        if again.signature.guard is not None:
            again.signature.guard(*pytree.tree_leaves((inputs.args, inputs.kwargs)))
        if to_text(again) != text:
            return
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        return
    file = _file(key)
    with contextlib.suppress(OSError, SafetensorError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with aside(file) as (place,):
            values = {name: value.detach().contiguous().clone() for name, value in trace.constants.items()}
            save_file(values, place, metadata={_KEY: text})


def _file(key: str) -> Path:
    return cache_folder("traces") / f"{key}.safetensors"
