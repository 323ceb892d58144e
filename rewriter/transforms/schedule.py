"""Schedules: what a transform does over the optimiser's steps, declared by the transform itself.

`site.schedule(Prune(...))` in an expression. Equal schedules (frozen dataclasses compare by their fields) form one pool
over all sites, so that sites can compete for one budget. A schedule sees the pool's tensors and keeps a state there:
what it puts into `Member.state` goes into checkpoints and comes back on resume.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Schedule:
    """Base of all schedules; a frozen dataclass that overrides what it needs."""

    def choose(self, pool: "Pool") -> None:
        """Before the rewrite, on the frozen model: decide sizes and values by the data. Not called where a size of the
        transform is settled already."""

    def before_step(self, pool: "Pool") -> None:
        """The gradients are there, the optimiser has not stepped."""

    def after_step(self, pool: "Pool", step: int, steps: int) -> None:
        """`step` optimiser steps of `steps` are done."""

    def settle(self, pool: "Pool") -> None:
        """After the last step: what is left, as sizes and values; the expression is then composed with them anew."""


@dataclass(frozen=True)
class Member:
    """One site's part in a pool.

    Attributes:
        name: of the transform at its site; its leaves are called `<name>.<leaf>`.
        shape: (..., n, m) of the site.
        tensors: name of a leaf -> the tensor itself, tuned, chosen or constant; empty before the rewrite.
        state: what the schedule keeps from step to step; tensors by any name, in every checkpoint.
        sizes: what is settled, as `Scope.size` reads it.
        values: leaf -> its value from here on.
    """

    name: str
    shape: tuple[int, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    state: dict[str, Tensor] = field(default_factory=dict, repr=False)
    sizes: dict[str, int] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __getitem__(self, leaf: str) -> Tensor:
        return self.tensors[leaf]

    @property
    def matrices(self) -> int:
        """How many matrices a batch holds."""
        return math.prod(self.shape[:-2])

    def entries(self, density: float) -> int:
        """How many entries of each of its matrices a density is, at least one."""
        return max(1, round(density * self.shape[-2] * self.shape[-1]))


class Probe(Protocol):
    """What a schedule can ask of the data and the optimiser."""

    rows: int
    seed: int

    def squared_gradients(self, names: list[str], rows: Sequence[int]) -> list[Tensor]: ...
    def losses(self, rows: Sequence[int]) -> Tensor: ...
    def moments(self, leaf: str) -> list[Tensor]: ...


@dataclass(frozen=True)
class Pool:
    """All sites of equal schedules."""

    members: tuple[Member, ...]
    probe: Probe = field(repr=False)

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def rows(self) -> int:
        """How many training rows there are."""
        return self.probe.rows

    def generator(self, step: int) -> torch.Generator:
        """A generator for decisions at a step: the run's seed and the step decide what it draws."""
        return torch.Generator().manual_seed(self.probe.seed * 1_000_003 + step)

    def squared_gradients(self, rows: Sequence[int]) -> list[Tensor]:
        """Of each member, shape (..., n, m): the mean squared gradient of every entry of its weight over training rows,
        one at a time: the diagonal of the empirical Fisher information. One dense accumulator per weight lives then.

        Raises:
            SpecError: the loss does not reach a weight.
        """
        return self.probe.squared_gradients([one.name for one in self.members], rows)

    def losses(self, rows: Sequence[int]) -> Tensor:
        """The loss of each of these training rows, on the CPU."""
        return self.probe.losses(rows)

    def moments(self, member: Member, leaf: str) -> list[Tensor]:
        """The optimiser's tensors of a tuned leaf that are of its shape: they follow where its entries are moved."""
        return self.probe.moments(f"{member.name}.{leaf}")

    def hold(self, leaf: str, mask: str) -> None:
        """Keep at 0 the entries of a leaf that a mask in the state leaves out."""
        with torch.no_grad():
            for one in self.members:
                one[leaf].mul_(one.state[mask].to(one[leaf].device))


def largest(counts: list[int], scores: list[Tensor]) -> list[Tensor]:
    """Row-major indices (int64, ascending) of the largest scores of all sites together, as many as `counts` sum to.

    Batches of matrices keep their own count for each matrix, since one tensor holds them all.
    """
    batched = [score.ndim > 2 for score in scores]
    flat = [score.flatten(-2) for score in scores]
    pooled = [values for values, alone in zip(flat, batched, strict=True) if not alone]
    total = sum(count for count, alone in zip(counts, batched, strict=True) if not alone)
    mask = torch.zeros(sum(map(len, pooled)), dtype=torch.bool)
    if pooled:
        mask[torch.cat(pooled).cpu().topk(total).indices] = True
    parts = iter(mask.split([len(values) for values in pooled]))
    return [
        values.topk(count).indices.sort().values.cpu() if alone else next(parts).nonzero().squeeze(-1)
        for values, count, alone in zip(flat, counts, batched, strict=True)
    ]
