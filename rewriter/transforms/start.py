"""Start values: functions of (shape, generator) that draw or build a leaf's first value."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor


def kaiming_uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """U(-1/sqrt(n), 1/sqrt(n)) for a factor of shape (..., n, r): Kaiming's with a = sqrt(5), as in LoRA (ref. 21)."""
    bound = 1 / math.sqrt(shape[-2])
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def he_uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """U(-sqrt(6/n), sqrt(6/n)) for a factor of shape (..., n, r): Kaiming's for ReLU, as in VeRA (arXiv 2310.11454)."""
    return math.sqrt(6) * kaiming_uniform(shape, generator)


def normal(deviation: float) -> Callable[[tuple[int, ...], Generator], Tensor]:
    """Start values drawn from N(0, deviation^2)."""
    return lambda shape, generator: deviation * torch.randn(shape, generator=generator)


def eye(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """The identity matrix of shape (..., r, r)."""
    return torch.eye(shape[-1]).expand(shape).clone()


def choice(count: int) -> Callable[[tuple[int, ...], Generator], Tensor]:
    """Different indices below `count`, in random order; a batch of matrices has the same ones."""
    return lambda shape, generator: torch.randperm(count, generator=generator)[: shape[-1]].expand(shape)
