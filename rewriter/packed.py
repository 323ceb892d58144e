"""Checkpoints whose weights are in few bits: how each is stored, and the weight over its own codes."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from .algebra import Format, Quantised
from .algebra.quantised import NF4, in_pairs
from .base import AWQ, BITSANDBYTES, COMPRESSED, FP8, GPTQ, NAME, weight_files
from .errors import SpecError

# (name in the checkpoint, floating type) -> the weight.
Held = Callable[[str, torch.dtype], Quantised]
_PACKED = "weight_packed"
_FORMAT, _FLOATS = "pack-quantized", "float-quantized"
_ROWS = "qweight"
_SCALES = ("_scale_inv", "_scale")  # Both are factors.
# Layouts that are read, the default of those who write them first.
_LAYOUTS = {GPTQ: ("gptq", "gptq_v2"), AWQ: ("gemm",)}
# Where in eight packed numbers the first output is, the second, ...
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


def check_library(path: tuple[str, ...]) -> None:
    """Refuse what needs bitsandbytes where it is not installed.

    Args:
        path: place in the spec.

    Raises:
        SpecError: with how to install it.
    """
    if find_spec("bitsandbytes") is None:
        raise SpecError("it needs bitsandbytes: pip install 'subspan[quantise]'", path)


def in_few_bits(section: Mapping[str, Any], location: str, revision: str) -> tuple[dict[str, Format], Held]:
    """Name -> how it is stored, of a base model's weights in few bits, and what reads one of them.

    Args:
        section: `quantization_config` of its config.

    Raises:
        SpecError: there are none, they are of a hub, or of a kind that is not read; or a library is missing.
    """
    method, files = section["quant_method"], weight_files(location, revision) or []
    forms = _FORMS[method](section, files)
    if not forms:
        said = f"the base model is quantised by {method}, and its weights are not in a folder of it"
        raise SpecError(f"{said}; save it to one", NAME)
    return forms, partial(_READERS[method], section, forms, files)


def _of_bitsandbytes(_: Mapping[str, Any], files: Sequence[Path]) -> dict[str, Format]:
    check_library(NAME)
    found: dict[str, Format] = {}
    for file in files:
        with safetensors.safe_open(file, "pt") as held:
            for key in held.keys():  # noqa: SIM118 - no mapping
                weight, _, kind = key.partition(f".quant_state.{BITSANDBYTES}__")
                if kind:
                    if kind != NF4:
                        raise SpecError(f"{weight} of the base model is stored in {kind}; only {NF4} is read", NAME)
                    state = json.loads(bytes(held.get_tensor(key).tolist()))
                    found[weight] = Format(NF4, state["blocksize"])
                elif key.endswith(".SCB"):
                    weight = f"{key.removesuffix('.SCB')}.weight"
                    found[weight] = Format("int8", held.get_slice(weight).get_shape()[-1])
    return found


def _held(_: Any, forms: Mapping[str, Format], files: Sequence[Path], key: str, dtype: torch.dtype) -> Quantised:
    """A weight of bitsandbytes as one of ours."""
    form, tensors = forms[key], _tensors(files, key.removesuffix("weight"))
    codes = tensors["weight"]
    if form.method != NF4:
        return Quantised(codes, tensors["SCB"].float().view(-1, 1) / 127, None, form, dtype)
    state = json.loads(bytes(tensors[f"weight.quant_state.{BITSANDBYTES}__{NF4}"].tolist()))
    scales = tensors["weight.absmax"]
    if "nested_offset" in state:  # The scales are in 8 bits themselves, around their mean.
        own = tensors["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(scales)]
        scales = tensors["weight.nested_quant_map"][scales.int()] * own + state["nested_offset"]
    rows, columns = state["shape"]
    codes = codes.view(torch.uint8).view(rows, columns // 2)
    return Quantised(codes, scales.float().view(rows, columns // form.group), None, form, dtype)


def _tensors(files: Sequence[Path], start: str) -> dict[str, Tensor]:
    """What is stored under names that start so, by the rest of them."""
    found = {}
    for file in files:
        with safetensors.safe_open(file, "pt") as held:
            own = [name for name in held.keys() if name.startswith(start)]  # noqa: SIM118 - no mapping
            found |= {name.removeprefix(start): held.get_tensor(name) for name in own}
    return found


def _compressed(section: Mapping[str, Any], files: Sequence[Path]) -> dict[str, Format]:
    """Of compressed-tensors: whole numbers of 4 bits, or of 8 around zero, a scale for a group or a whole row; or
    floats of 8 bits."""
    groups = section.get("config_groups", {}).values()
    if groups and all((one.get("format") or section.get("format")) == _FLOATS for one in groups):
        return _floats(section, files)
    for group in groups:
        weights = group.get("weights") or {}
        bits, form = weights.get("num_bits"), group.get("format") or section.get("format")
        plain = weights.get("type") == "int" and weights.get("strategy") in ("group", "channel")
        plain &= not weights.get("actorder") and not group.get("input_activations")
        if not plain or form != _FORMAT or bits not in (4, 8) or not (bits == 4 or weights.get("symmetric", True)):
            said = f"the base model is stored as {form}, {weights.get('type')}{bits} by {weights.get('strategy')}"
            said += f"; only {_FORMAT} of weights alone, int4 or symmetric int8, by group or channel, in order, is read"
            raise SpecError(said, NAME)
    found: dict[str, Format] = {}
    for file in files:
        with safetensors.safe_open(file, "pt") as held:
            for key in held.keys():  # noqa: SIM118 - no mapping
                if key.endswith(f".{_PACKED}"):
                    _, columns = held.get_tensor(key.replace(_PACKED, "weight_shape")).tolist()
                    bits = 32 * held.get_slice(key).get_shape()[1] // columns
                    groups = held.get_slice(key.replace(_PACKED, "weight_scale")).get_shape()[1]
                    found[key.replace(_PACKED, "weight")] = Format(f"int{bits}", columns // groups)
    return found


def _floats(section: Mapping[str, Any], files: Sequence[Path]) -> dict[str, Format]:
    """Floats of 8 bits: a scale for a block of rows and columns, for a row, or one for all."""
    found: dict[str, Format] = {}
    for file in files:
        with safetensors.safe_open(file, "pt") as held:
            names = set(held.keys())
            for key in names:
                dtype = held.get_slice(key).get_dtype()
                scale = next((one for end in _SCALES if (one := f"{key}{end}") in names), None)
                if scale is None and dtype.startswith("F8") and not key.endswith(_SCALES):
                    raise SpecError(f"{key} of the base model is stored in {dtype} without a scale", NAME)
                if scale is None:
                    continue
                rows, columns = held.get_slice(key).get_shape()
                shape = held.get_slice(scale).get_shape()
                block = columns if _by_row(shape, rows) else _block(section)[1]
                if dtype != "F8_E4M3" or (block != columns and len(shape) != 2):
                    said = f"{key} of the base model is stored in {dtype} with scales of {' x '.join(map(str, shape))}"
                    raise SpecError(f"{said}; only F8_E4M3 by blocks, rows or as a whole is read", NAME)
                found[key] = Format("fp8", block)
    return dict(sorted(found.items()))


def _by_row(shape: Sequence[int], rows: int) -> bool:
    """Whether scales are one for each row, or one for all."""
    return math.prod(shape) == 1 or list(shape) in ([rows], [rows, 1])


def _block(section: Mapping[str, Any]) -> Sequence[int]:
    """Rows and columns that share a scale."""
    groups = section.get("config_groups", {}).values()
    said = [(one.get("weights") or {}).get("block_structure") for one in groups] or [section.get("weight_block_size")]
    if not said[0] or any(one != said[0] for one in said):
        raise SpecError("the base model's config does not say which blocks of its weights share a scale", NAME)
    return said[0]


def _of_floats(
    section: Mapping[str, Any], forms: Mapping[str, Format], files: Sequence[Path], key: str, dtype: torch.dtype
) -> Quantised:
    """A weight in floats of 8 bits as one of ours, which has scales for every row."""
    tensors = _tensors(files, key)
    codes, scales = tensors[""], next(tensors[end] for end in _SCALES if end in tensors).float()
    rows = codes.shape[0]
    if _by_row(scales.shape, rows):
        scales = scales.reshape(-1, 1).expand(rows, 1)
    else:
        scales = scales.repeat_interleave(_block(section)[0], 0)[:rows]
    return Quantised(codes.view(torch.uint8), scales.contiguous(), None, forms[key], dtype)


def _unpacked(
    section: Mapping[str, Any], forms: Mapping[str, Format], files: Sequence[Path], key: str, dtype: torch.dtype
) -> Quantised:
    """A weight of compressed-tensors as one of ours: its codes count from the least number, ours of int8 from zero."""
    form, tensors = forms[key], _tensors(files, f"{key}_")
    if form.method == "fp8":
        return _of_floats(section, forms, files, key, dtype)
    bits = int(form.method.removeprefix("int"))
    codes, scales = _numbers(tensors["packed"], bits), tensors["scale"].float()
    if bits == 8:
        return Quantised((codes.int() - 128).to(torch.int8), scales, None, form, dtype)
    zeros = torch.full_like(scales, 8, dtype=torch.uint8)
    if "zero_point" in tensors:  # Packed along the rows.
        zeros = _numbers(tensors["zero_point"].t().contiguous(), bits).t()[: len(scales)].contiguous()
    return Quantised(in_pairs(codes), scales, zeros, form, dtype)


def _of_rows(section: Mapping[str, Any], files: Sequence[Path]) -> dict[str, Format]:
    """Of GPTQ and AWQ: whole numbers of 4 bits, a scale and a zero for a group of inputs, in order."""
    method, bits, layout = section["quant_method"], section.get("bits"), _layout(section)
    if bits != 4 or layout not in _LAYOUTS[method]:
        said = f"the base model is stored by {method} in {bits} bits as {layout}"
        raise SpecError(f"{said}; only 4 bits as {' or '.join(_LAYOUTS[method])} is read", NAME)
    found: dict[str, Format] = {}
    for file in files:
        with safetensors.safe_open(file, "pt") as held:
            for key in held.keys():  # noqa: SIM118 - no mapping
                layer, _, name = key.rpartition(".")
                if name != _ROWS:
                    continue
                inputs = held.get_slice(key).get_shape()[0] * (8 if method == GPTQ else 1)
                groups, outputs = held.get_slice(f"{layer}.scales").get_shape()
                if held.get_slice(f"{layer}.qzeros").get_shape()[1] * 8 != outputs:
                    raise SpecError(f"{layer} of the base model is not in 4 bits as its config says", NAME)
                group = inputs // groups
                if f"{layer}.g_idx" in held.keys():  # noqa: SIM118 - no mapping
                    order = held.get_tensor(f"{layer}.g_idx").long()
                    if not torch.equal(order, torch.arange(inputs) // group):
                        said = f"{layer} of the base model has its inputs in the order of desc_act, which is not read"
                        raise SpecError(f"{said}; quantise it with desc_act: false", NAME)
                found[f"{layer}.weight"] = Format("int4", group)
    return found


def _layout(section: Mapping[str, Any]) -> str:
    """The key is another one by who wrote the checkpoint, and when."""
    if section.get("is_marlin_format"):
        return "marlin"
    said = (section.get(key) for key in ("checkpoint_format", "version", "format"))
    return str(next((one for one in said if one), _LAYOUTS[section["quant_method"]][0])).lower()


def _by_rows(
    section: Mapping[str, Any], forms: Mapping[str, Format], files: Sequence[Path], key: str, dtype: torch.dtype
) -> Quantised:
    """A weight of GPTQ or AWQ as one of ours: they have inputs before outputs. GPTQ packs codes along the inputs, and
    writes zeros less one but in its second format; AWQ packs along the outputs, eight in an order of its own."""
    tensors = _tensors(files, key.removesuffix("weight"))
    codes, zeros = tensors[_ROWS], _numbers(tensors["qzeros"], 4)
    if section["quant_method"] == GPTQ:
        codes = _numbers(codes.t(), 4)
        zeros = zeros if _layout(section) == "gptq_v2" else zeros + 1 & 15
    else:
        codes, zeros = (one.unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1) for one in (_numbers(codes, 4), zeros))
        codes = codes.t()
    scales = tensors["scales"].float().t().contiguous()
    return Quantised(in_pairs(codes.contiguous()), scales, zeros.t().contiguous(), forms[key], dtype)


def _numbers(packed: Tensor, bits: int) -> Tensor:
    """(rows, columns) uint8 of (rows, columns bits / 32) int32, the first number in the lowest bits."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (packed.unsqueeze(-1) >> shifts & (2**bits - 1)).to(torch.uint8).flatten(-2)


_FORMS = {BITSANDBYTES: _of_bitsandbytes, COMPRESSED: _compressed, GPTQ: _of_rows, AWQ: _of_rows, FP8: _floats}
_READERS = {BITSANDBYTES: _held, COMPRESSED: _unpacked, GPTQ: _by_rows, AWQ: _by_rows, FP8: _of_floats}
