"""Checkpoints whose weights are in few bits: how each is stored, and the weight over its own codes."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import safetensors
import torch
from torch import Tensor

from .algebra import Format, Quantised
from .algebra.quantised import FP4, FP8, NF4, in_pairs
from .base import AWQ, BITSANDBYTES, COMPRESSED, FINE_GRAINED, GPTQ, NAME, Place, places
from .errors import SpecError

# (name in the checkpoint, floating type) -> the weight.
Held = Callable[[str, torch.dtype], Quantised]
# By name; parts of a weight may be in several files.
Places = Mapping[str, Place]
_PACKED = "packed"
_FORMAT, _FLOATS = "pack-quantized", "float-quantized"
_ROWS = "qweight"
_ORDERED = ("group", "dynamic")  # compressed-tensors' `actorder` that groups inputs by it
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
    method, there = section["quant_method"], places(location, revision)
    if not there:
        said = f"the base model is quantised by {method}, and its weights are not in a folder of it"
        raise SpecError(f"{said}; save it to one", NAME)
    forms = _FORMS[method](section, there)
    if not forms:
        raise SpecError(f"its config says that the base model is quantised by {method}, and no weight of it is", NAME)
    return forms, partial(_READERS[method], section, forms, there)


def _tensor(there: Places, key: str) -> Tensor:
    with safetensors.safe_open(there[key].file, "pt") as held:
        return held.get_tensor(key)


def _tensors(there: Places, start: str) -> dict[str, Tensor]:
    """What is stored under names that start so, by the rest of them."""
    return {key.removeprefix(start): _tensor(there, key) for key in there if key.startswith(start)}


def _described(there: Places, key: str, types: Sequence[str] | None, dimensions: int | None = 2) -> list[int]:
    """The shape of a tensor.

    Args:
        types: of safetensors, that it may have; None: any.
        dimensions: that it has; None: any.

    Raises:
        SpecError: it is missing, or not so.
    """
    if key not in there:
        raise SpecError(f"{key} of the base model is missing", NAME)
    _, dtype, shape = there[key]
    if (types and dtype not in types) or dimensions not in (None, len(shape)):
        said = f"{key} of the base model is {' x '.join(map(str, shape)) or 'a number'} of {dtype}"
        raise SpecError(f"{said}, which is not what its config says", NAME)
    return shape


_FLOATING = ("F32", "F16", "BF16")


def _group(layer: str, columns: int, groups: int, said: Sequence[int | None]) -> int:
    """Entries of a row that share a scale.

    Args:
        said: by the config; None or -1: all.

    Raises:
        SpecError: the file has others.
    """
    for one in said:
        size = columns if one in (None, -1) else one
        if size * groups == columns:
            return size
    own = " or ".join("rows" if one in (None, -1) else f"groups of {one}" for one in said)
    raise SpecError(f"{layer} of the base model has {groups} scales for {columns} inputs; {own} are read", NAME)


def _of_bitsandbytes(_: Mapping[str, Any], there: Places) -> dict[str, Format]:
    check_library(NAME)
    found: dict[str, Format] = {}
    for key in there:
        weight, _, kind = key.partition(f".quant_state.{BITSANDBYTES}__")
        if kind:
            if kind not in (NF4, FP4):
                raise SpecError(f"{weight} of the base model is stored in {kind}; {NF4} and {FP4} are read", NAME)
            state = json.loads(bytes(_tensor(there, key).tolist()))
            found[weight] = Format(kind, state["blocksize"])
        elif key.endswith(".SCB"):
            weight = f"{key.removesuffix('.SCB')}.weight"
            found[weight] = Format("int8", _described(there, weight, ("I8",))[-1])
    return found


def _held(_: Any, forms: Mapping[str, Format], there: Places, key: str, dtype: torch.dtype) -> Quantised:
    """A weight of bitsandbytes as one of ours."""
    form, tensors = forms[key], _tensors(there, key.removesuffix("weight"))
    codes = tensors["weight"]
    if form.method not in (NF4, FP4):
        return Quantised(codes, tensors["SCB"].float().view(-1, 1) / 127, None, form, dtype)
    state = json.loads(bytes(tensors[f"weight.quant_state.{BITSANDBYTES}__{form.method}"].tolist()))
    scales = tensors["weight.absmax"]
    if "nested_offset" in state:  # The scales are in 8 bits themselves, around their mean.
        own = tensors["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(scales)]
        scales = tensors["weight.nested_quant_map"][scales.int()] * own + state["nested_offset"]
    rows, columns = state["shape"]
    codes = codes.view(torch.uint8).view(rows, columns // 2)
    return Quantised(codes, scales.float().view(rows, columns // form.group), None, form, dtype)


def _compressed(section: Mapping[str, Any], there: Places) -> dict[str, Format]:
    """Of compressed-tensors: whole numbers of 4 bits, or of 8 around zero, a scale for a group or a whole row; or
    floats of 8 bits."""
    for key in ("transform_config", "sparsity_config"):
        if section.get(key) and section[key].get("format") != "dense":
            raise SpecError(f"the base model's weights are stored with a {key}, which is not read", NAME)
    groups = list(section.get("config_groups", {}).values())
    weights = [one.get("weights") or {} for one in groups]
    formats = [one.get("format") or section.get("format") for one in groups]
    if groups and set(formats) == {_FLOATS}:
        return _floats(section, there)
    for group, own, form in zip(groups, weights, formats, strict=True):
        bits = own.get("num_bits")
        plain = own.get("type") == "int" and own.get("strategy") in ("group", "channel")
        plain &= not group.get("input_activations")
        if not plain or form != _FORMAT or bits not in (4, 8) or not (bits == 4 or own.get("symmetric", True)):
            said = f"the base model is stored as {form}, {own.get('type')}{bits} by {own.get('strategy')}"
            said += f"; only {_FORMAT} of weights alone, int4 or symmetric int8, by group or channel, in order, is read"
            raise SpecError(said, NAME)
    found: dict[str, Format] = {}
    for key in there:
        if not key.endswith(f".weight_{_PACKED}"):
            continue
        name = key.removesuffix(f"_{_PACKED}")
        _described(there, f"{name}_shape", None, 1)
        rows, columns = _tensor(there, f"{name}_shape").tolist()
        shape = _described(there, key, ("I32",))
        fitting = [own for own in weights if shape == [rows, -(-columns * own["num_bits"] // 32)]]
        zero = f"{name}_zero_point" in there
        fitting = [own for own in fitting if own.get("symmetric", True) != zero]
        ordered = f"{name}_g_idx" in there
        there_too = [own for own in fitting if (own.get("actorder") in _ORDERED) == ordered]
        if not there_too:
            words = f"{' x '.join(map(str, shape))} words of codes"
            how = f"{words}, with{'' if zero else 'out'} zero points"
            how = f"an order of inputs ({'' if ordered else 'no '}{name}_g_idx)" if fitting else how
            raise SpecError(f"{name} of the base model is stored in {how}; its config says otherwise", NAME)
        scales = _described(there, f"{name}_scale", _FLOATING)
        said = [own.get("group_size") if own["strategy"] == "group" else None for own in there_too]
        group = _group(name, columns, scales[1], said)
        if ordered:
            _order(there, f"{name}_g_idx", columns, group)
        found[name] = Format(f"int{fitting[0]['num_bits']}", group, ordered)
    return found


def _floats(section: Mapping[str, Any], there: Places) -> dict[str, Format]:
    """Floats of 8 bits: a scale for a block of rows and columns, for a row, or one for all."""
    found: dict[str, Format] = {}
    for key, (_, dtype, _) in there.items():
        scales = [one for end in _SCALES if (one := f"{key}{end}") in there]
        if len(scales) > 1:
            raise SpecError(f"{key} of the base model has {' and '.join(scales)}: which one counts is not known", NAME)
        if not scales:
            if dtype.startswith("F8") and not key.endswith(_SCALES):
                raise SpecError(f"{key} of the base model is stored in {dtype} without a scale", NAME)
            continue
        rows, columns = _described(there, key, ("F8_E4M3",))
        shape = _described(there, scales[0], (*_FLOATING, "F8_E8M0"), None)
        if f"{key}_zero_point" in there:
            raise SpecError(f"{key} of the base model is stored with zero points, which are not read", NAME)
        if _by_row(shape, rows):
            found[key] = Format(FP8, columns)
            continue
        high, wide = _block(section)
        if shape != [-(-rows // high), -(-columns // wide)]:
            said = f"{scales[0]} of the base model is {' x '.join(map(str, shape))}"
            raise SpecError(f"{said}, and {rows} x {columns} weights are not so many blocks of {high} x {wide}", NAME)
        found[key] = Format(FP8, wide)
    return found


def _by_row(shape: Sequence[int], rows: int) -> bool:
    """Whether scales are one for each row, or one for all."""
    return math.prod(shape) == 1 or list(shape) in ([rows], [rows, 1])


def _block(section: Mapping[str, Any]) -> Sequence[int]:
    """Rows and columns that share a scale."""
    groups = section.get("config_groups", {}).values()
    said = [(one.get("weights") or {}).get("block_structure") for one in groups] or [section.get("weight_block_size")]
    first = said[0]
    sizes = isinstance(first, list) and len(first) == 2 and all(isinstance(one, int) and one > 0 for one in first)
    if not sizes or any(one != first for one in said):
        said = "the base model's config does not say how many rows and columns of its weights share a scale"
        raise SpecError(f"{said}, e.g. [128, 128]", NAME)
    return first


def _of_floats(
    section: Mapping[str, Any], forms: Mapping[str, Format], there: Places, key: str, dtype: torch.dtype
) -> Quantised:
    """A weight in floats of 8 bits as one of ours, which has scales for every row."""
    tensors = _tensors(there, key)
    codes, scales = tensors[""], next(tensors[end] for end in _SCALES if end in tensors).float()
    rows = codes.shape[0]
    if _by_row(scales.shape, rows):
        scales = scales.reshape(-1, 1).expand(rows, 1)
    else:
        scales = scales.repeat_interleave(_block(section)[0], 0)[:rows]
    return Quantised(codes.view(torch.uint8), scales.contiguous(), None, forms[key], dtype)


def _unpacked(
    section: Mapping[str, Any], forms: Mapping[str, Format], there: Places, key: str, dtype: torch.dtype
) -> Quantised:
    """A weight of compressed-tensors as one of ours: its codes count from the least number, ours of int8 from zero."""
    form, tensors = forms[key], _tensors(there, f"{key}_")
    if form.method == FP8:
        return _of_floats(section, forms, there, key, dtype)
    bits = int(form.method.removeprefix("int"))
    rows, columns = tensors["shape"].tolist()
    codes, scales = _numbers(tensors[_PACKED], bits)[:, :columns], tensors["scale"].float()
    codes, order = _by_group(codes, tensors["g_idx"].long() if form.ordered else None)
    if bits == 8:
        return Quantised((codes.int() - 128).to(torch.int8), scales, None, form, dtype, order=order)
    zeros = torch.full_like(scales, 8, dtype=torch.uint8)
    if "zero_point" in tensors:  # Packed along the rows.
        zeros = _numbers(tensors["zero_point"].t().contiguous(), bits).t()[:rows].contiguous()
    return Quantised(in_pairs(codes), scales, zeros, form, dtype, order=order)


def _order(there: Places, key: str, columns: int, group: int) -> Tensor:
    """The group of each input.

    Raises:
        SpecError: groups are not of so many inputs each.
    """
    _described(there, key, ("I32", "I64"), 1)
    found = _tensor(there, key).long()
    if len(found) != columns or not torch.equal(found.sort().values, torch.arange(columns) // group):
        said = f"{key} of the base model does not put its {columns} inputs into groups of {group} each"
        raise SpecError(said, NAME)
    return found


def _by_group(codes: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Codes (rows, columns) with a group's columns next to each other, and the place of each column among them."""
    if groups is None:
        return codes, None
    sorting = groups.argsort(stable=True)
    return codes[:, sorting], sorting.argsort().to(torch.int32)


def _of_rows(section: Mapping[str, Any], there: Places) -> dict[str, Format]:
    """Of GPTQ and AWQ: whole numbers of 4 bits, a scale and a zero for a group of inputs; GPTQ's of any order."""
    method, bits, layout = section["quant_method"], section.get("bits"), _layout(section)
    if bits != 4 or layout not in _LAYOUTS[method]:
        said = f"the base model is stored by {method} in {bits!r} bits as {layout}"
        raise SpecError(f"{said}; only 4 bits as {' or '.join(_LAYOUTS[method])} is read", NAME)
    found: dict[str, Format] = {}
    for key in there:
        layer, _, name = key.rpartition(".")
        if name != _ROWS:
            continue
        first, second = _described(there, key, ("I32",))
        groups, outputs = _described(there, f"{layer}.scales", _FLOATING)
        inputs = first * 8 if method == GPTQ else first
        words = -(-outputs // 8)
        packed = outputs if method == GPTQ else words
        if second != packed or _described(there, f"{layer}.qzeros", ("I32",)) != [groups, words]:
            raise SpecError(f"{layer} of the base model is not in 4 bits as {method} packs them", NAME)
        group = _group(layer, inputs, groups, [section.get("group_size")])
        order = _order(there, f"{layer}.g_idx", inputs, group) if f"{layer}.g_idx" in there else None
        if order is None and section.get("desc_act"):
            raise SpecError(f"{layer}.g_idx of the base model, the order of desc_act, is missing", NAME)
        ordered = order is not None and not torch.equal(order, torch.arange(inputs) // group)
        found[f"{layer}.weight"] = Format("int4", group, ordered)
    return found


def _layout(section: Mapping[str, Any]) -> str:
    """The key is another one by who wrote the checkpoint, and when."""
    if section.get("is_marlin_format"):
        return "marlin"
    said = (section.get(key) for key in ("checkpoint_format", "version", "format"))
    return str(next((one for one in said if one), _LAYOUTS[section["quant_method"]][0])).lower()


def _by_rows(
    section: Mapping[str, Any], forms: Mapping[str, Format], there: Places, key: str, dtype: torch.dtype
) -> Quantised:
    """A weight of GPTQ or AWQ as one of ours: they have inputs before outputs. GPTQ packs codes along the inputs, and
    writes zeros less one but in its second format; AWQ packs along the outputs, eight in an order of its own."""
    form, tensors = forms[key], _tensors(there, key.removesuffix("weight"))
    codes, zeros = tensors[_ROWS], _numbers(tensors["qzeros"], 4)
    if section["quant_method"] == GPTQ:
        codes = _numbers(codes.t(), 4)
        zeros = zeros if _layout(section) == "gptq_v2" else zeros + 1 & 15
    else:
        codes, zeros = (one.unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1) for one in (_numbers(codes, 4), zeros))
        codes = codes.t()
    scales = tensors["scales"].float().t().contiguous()
    zeros = zeros[:, : len(scales)].t().contiguous()
    codes, order = _by_group(codes.contiguous(), tensors["g_idx"].long() if form.ordered else None)
    return Quantised(in_pairs(codes), scales, zeros, form, dtype, order=order)


def _numbers(packed: Tensor, bits: int) -> Tensor:
    """(rows, columns) uint8 of (rows, columns bits / 32) int32, the first number in the lowest bits."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (packed.unsqueeze(-1) >> shifts & (2**bits - 1)).to(torch.uint8).flatten(-2)


_FORMS = {BITSANDBYTES: _of_bitsandbytes, COMPRESSED: _compressed, GPTQ: _of_rows, AWQ: _of_rows, FINE_GRAINED: _floats}
_READERS = {BITSANDBYTES: _held, COMPRESSED: _unpacked, GPTQ: _by_rows, AWQ: _by_rows, FINE_GRAINED: _of_floats}
