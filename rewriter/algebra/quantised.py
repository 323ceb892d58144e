"""Frozen weights in few bits."""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from .stored import Stored, aten

NF4, FP4, FP8 = "nf4", "fp4", "fp8"
_E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Format:
    """How a row of a weight is stored.

    Attributes:
        method: "nf4" (4-bit normal floats, Dettmers et al., arXiv 2305.14314, by bitsandbytes), "int4" (whole numbers
            with a zero point), "int8" (symmetric whole numbers), "fp4" (4-bit floats of bitsandbytes) or "fp8" (E4M3
            floats, arXiv 2209.05433).
        group: entries of a row that share a scale.
        ordered: whether these are not next to each other.
    """

    method: str
    group: int
    ordered: bool = False


class Quantised(Stored):
    """A frozen weight of shape (..., rows, columns) by its codes and scales.

    Attributes:
        codes: (..., rows, columns) of int8, of uint8 for "fp8" (its bits), or (..., rows, columns / 2) of uint8, two
            entries in each; group after group.
        scales: (..., rows, columns / group), float32.
        zeros: uint8 of the scales' shape for "int4", else None.
        order: (columns,) int32, the place of each column among the codes; None: they are in order.
        form: how to read them.
        flipped: whether the last two dimensions are the other way round.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    form: Format
    flipped: bool

    @staticmethod
    def __new__(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        form: Format,
        dtype: torch.dtype,
        flipped: bool = False,
        order: Tensor | None = None,
    ) -> Self:
        columns = scales.shape[-1] * form.group
        like = torch.empty(*scales.shape[:-1], columns, device="meta")
        like = like.transpose(-2, -1) if flipped else like
        out = Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), dtype=dtype, device=codes.device)
        out.codes, out.scales, out.zeros, out.order = codes, scales, zeros, order
        out.form, out.flipped = form, flipped
        return out

    @classmethod
    def of(cls, weight: Tensor, form: Format) -> Self:
        """A weight of shape (..., rows, columns) in few bits; `form.group` divides its columns."""
        order = torch.arange(weight.shape[-1], dtype=torch.int32, device=weight.device) if form.ordered else None
        return cls(*_METHODS[form.method][0](weight.detach(), form.group), form, weight.dtype, order=order)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that it is held in."""
        return tuple(one for one in (self.codes, self.scales, self.zeros, self.order) if one is not None)

    def dense(self) -> Tensor:
        """The weight that its codes mean, in its floating type."""
        return _dense(self.form, self.dtype, self.flipped, self.parts)

    def of_parts(self) -> Callable[[Sequence[Tensor]], Tensor]:
        return partial(_dense, self.form, self.dtype, self.flipped)

    def again(self, fn: Callable[[Tensor], Tensor] = lambda one: one, flip: bool = False) -> "Quantised":
        own = self.of_rows(fn, flip)
        own.order = None if self.order is None else fn(self.order)
        return own

    def of_rows(self, fn: Callable[[Tensor], Tensor], flip: bool = False) -> "Quantised":
        """As `again`, with a function that takes some of the rows."""
        zeros, flipped = None if self.zeros is None else fn(self.zeros), self.flipped != flip
        return Quantised(fn(self.codes), fn(self.scales), zeros, self.form, self.dtype, flipped, self.order)

    def __repr__(self) -> str:
        return f"Quantised({self.form.method}, group {self.form.group}, {tuple(self.shape)}, {self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = [name for name in ("codes", "scales", "zeros", "order") if getattr(self, name) is not None]
        return names, (self.form, self.dtype, self.flipped)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> "Quantised":
        form, dtype, flipped = meta
        zeros, order = inner.get("zeros"), inner.get("order")
        return Quantised(inner["codes"], inner["scales"], zeros, form, dtype, flipped, order)


def _dense(form: Format, dtype: torch.dtype, flipped: bool, parts: Sequence[Tensor]) -> Tensor:
    *stored, order = parts if form.ordered else (*parts, None)
    made = _METHODS[form.method][1](*stored).to(dtype)
    made = made if order is None else made.index_select(-1, order)
    return made.transpose(-2, -1) if flipped else made


# Further ops that leave a quantised weight quantised, or read some rows of it alone.


def _copied(weight: Quantised, *, memory_format: torch.memory_format | None = None) -> Quantised | None:
    """A copy in order is one whose memory may be viewed: a flipped one has none."""
    return None if weight.flipped and memory_format == torch.contiguous_format else weight.again(torch.clone)


def _selected(weight: Quantised, dim: int, index: int) -> Quantised | None:
    if dim % weight.ndim or weight.ndim < 3:
        return None
    return weight.of_rows(lambda one: one[index])


def _sliced(weight: Quantised, dim: int = 0, start=None, stop=None, step: int = 1) -> Quantised | None:
    if dim % weight.ndim or (weight.flipped and weight.ndim < 3):
        return None
    return weight.of_rows(lambda one: one[start:stop:step])


def _picked(weight: Quantised, rows: Tensor) -> Tensor | None:
    if weight.flipped and weight.ndim < 3:
        return None
    shape = (*rows.shape, *weight.shape[1:])
    return weight.of_rows(lambda one: one.index_select(0, rows.reshape(-1))).dense().reshape(shape)


def _looked_up(weight: Quantised, rows: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return _picked(weight, rows)


def _index_selected(weight: Quantised, dim: int, rows: Tensor) -> Tensor | None:
    return None if dim % weight.ndim else _picked(weight, rows)


def _indexed(weight: Quantised, indices: list[Tensor | None], **_: Any) -> Tensor | None:
    one = indices[0] if len(indices) == 1 else None
    return None if one is None or one.dtype == torch.bool else _picked(weight, one)


Quantised.kept = Stored.kept | {
    aten.clone.default: _copied,
    aten.select.int: _selected,
    aten.slice.Tensor: _sliced,
    aten.embedding.default: _looked_up,
    aten.index_select.default: _index_selected,
    aten.index.Tensor: _indexed,
}


# How rows become codes and back.


def _grouped(weight: Tensor, group: int) -> Tensor:
    return weight.float().unflatten(-1, (-1, group))


def in_pairs(codes: Tensor) -> Tensor:
    """Codes from 0 to 15, two of a row in each byte."""
    pairs = codes.unflatten(-1, (-1, 2))
    return pairs[..., 0] << 4 | pairs[..., 1]


def _unpacked(codes: Tensor) -> Tensor:
    return torch.stack((codes >> 4, codes & 15), -1).flatten(-2)


def _to_int8(weight: Tensor, group: int) -> tuple[Tensor, Tensor, None]:
    values = _grouped(weight, group)
    scales = values.abs().amax(-1) / 127
    codes = (values / _divisor(scales).unsqueeze(-1)).round_().to(torch.int8)
    return codes.flatten(-2), scales, None


def _from_int8(codes: Tensor, scales: Tensor) -> Tensor:
    return (codes.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)


def _to_fp8(weight: Tensor, group: int) -> tuple[Tensor, Tensor, None]:
    values = _grouped(weight, group)
    scales = values.abs().amax(-1) / torch.finfo(_E4M3).max
    codes = (values / _divisor(scales).unsqueeze(-1)).to(_E4M3).view(torch.uint8)
    return codes.flatten(-2), scales, None


def _from_fp8(codes: Tensor, scales: Tensor) -> Tensor:
    return _from_int8(codes.view(_E4M3).to(scales.dtype), scales)


def _to_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    values = _grouped(weight, group)
    least, most = values.amin(-1).clamp_(max=0), values.amax(-1).clamp_(min=0)
    scales = (most - least) / 15
    zeros = (-least / _divisor(scales)).round_().clamp_(0, 15)
    codes = (values / _divisor(scales).unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(0, 15)
    return in_pairs(codes.to(torch.uint8).flatten(-2)), scales, zeros.to(torch.uint8)


def _from_int4(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    values = _unpacked(codes).unflatten(-1, (scales.shape[-1], -1))
    return ((values.to(scales.dtype) - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).flatten(-2)


def _divisor(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales, 1)  # A group of zeros stays one.


def _to_bits(kind: str, weight: Tensor, group: int) -> tuple[Tensor, Tensor, None]:
    *lead, columns = weight.shape
    shapes = (*lead, columns // 2), (*lead, columns // group)
    if weight.is_meta:
        codes, scales = (torch.empty(shape, device="meta") for shape in shapes)
        return codes.to(torch.uint8), scales, None
    _bitsandbytes()
    codes, scales = torch.ops.bitsandbytes.quantize_4bit(weight.contiguous(), group, kind, torch.uint8)
    return codes.view(shapes[0]), scales.view(shapes[1]), None


def _from_bits(kind: str, codes: Tensor, scales: Tensor) -> Tensor:
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    if codes.is_meta:
        return torch.empty(shape, device="meta")
    _bitsandbytes()
    group = shape[-1] // scales.shape[-1]
    codes, scales = codes.reshape(-1, 1), scales.reshape(-1)
    return torch.ops.bitsandbytes.dequantize_4bit(codes, scales, group, kind, shape, scales.dtype)


def _bitsandbytes() -> None:
    """Register its ops, without the kernels that it would fetch from a hub where the package for that is installed."""
    if not hasattr(torch.ops.bitsandbytes, "quantize_4bit"):
        there = sys.modules.pop("kernels", None)
        sys.modules["kernels"] = None
        try:
            importlib.import_module("bitsandbytes")
        finally:
            del sys.modules["kernels"]
            if there is not None:
                sys.modules["kernels"] = there


_METHODS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    NF4: (partial(_to_bits, NF4), partial(_from_bits, NF4)),
    "int8": (_to_int8, _from_int8),
    "int4": (_to_int4, _from_int4),
    # Of checkpoints alone.
    FP4: (partial(_to_bits, FP4), partial(_from_bits, FP4)),
    FP8: (_to_fp8, _from_fp8),
}
METHODS = tuple(name for name in _METHODS if name not in (FP4, FP8))
