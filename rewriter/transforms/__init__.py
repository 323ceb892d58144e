"""Transforms: each method is one short function from an operator to an operator, registered by its name.

A transform is called as `method(w, site, **options)`: `w` is the operator to transform, `site` declares its tensors. It
runs unchanged on meta tensors (the plan), on tensors (start values, merge) and on proxies (lowering).
"""

import hashlib
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, create_model

from ..algebra import Operator, Value
from ..errors import SpecError

MOST = 2**24  # of any size or number in a method's options: more is a slip, and shapes have to stay countable
Rank = Annotated[int, Field(ge=1, le=MOST, description="rank r of the low-rank factors; at most min(n, m)")]
Alpha = Annotated[
    float | None, Field(gt=0, description="numerator of the scale s = alpha / rank; default: the rank, so s = 1")
]
Probability = Annotated[float, Field(ge=0, lt=1, description="dropout probability on the input of the factors")]
ScaleOf = Annotated[
    Literal["fixed", "rslora", "learned"],
    Field(description="s: fixed is alpha / rank, rslora alpha / sqrt(rank), learned a tuned scalar from alpha / rank"),
]
Constraint = Annotated[
    Literal["o", "d", "n"] | None,
    Field(description="matrix pattern constraint: penalty o (25) or d (26), or n, a nonlinearity between the factors"),
]
Coefficient = Annotated[float, Field(ge=0, description="weight of the penalty in the loss, per site")]
Activation = Annotated[Literal["relu", "gelu", "silu", "tanh"], Field(description="the nonlinearity h")]
TargetRank = Annotated[
    int | None, Field(ge=1, le=MOST, description="mean rank that is left; default: two thirds of rank")
]
HiddenWidth = Annotated[
    int | None, Field(ge=1, le=MOST, description="width of the MLP that makes P while tuning; none by default")
]
Width = Annotated[int, Field(ge=1, le=MOST, description="width of the bottleneck")]
Length = Annotated[int, Field(ge=1, le=MOST, description="number of rows that are put before every sequence")]
Density = Annotated[float, Field(gt=0, le=1, description="share of the entries that are tuned")]
Samples = Annotated[int, Field(ge=1, le=MOST, description="training rows whose gradients decide")]
Interval = Annotated[int, Field(ge=1, le=MOST, description="optimiser steps from one decision to the next")]
Share = Annotated[float, Field(ge=0, lt=1, description="share of the optimiser steps")]
Positive = Annotated[float, Field(gt=0, description="a number above 0")]
Ratio = Annotated[float, Field(gt=0, description="learning rate of B over that of A (LoRA+, arXiv 2402.12354)")]
Factor = Annotated[
    int | None, Field(ge=1, le=MOST, description="largest size of the left factor; default: the root of n, of m")
]
Initial = float | Value | Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


# Files of methods; one of another name holds combinations, the general case.
CLASSES = ("reconstruction", "extension", "combination")
# What a transform can stand on. The first three are parameters; the others are found in the graph inside a module.
KINDS = ("matrix", "vector", "cross_attention", "attention", "feed_forward", "keys", "values", "embeddings")


@dataclass(frozen=True)
class Leaf:
    """A tensor that a transform declares.

    Attributes:
        role: "tuned"; "constant", computed from the frozen weight or drawn alike everywhere; or "chosen", indices that
            travel with the adapter.
        rate: its learning rate over the run's.
    """

    name: str
    shape: tuple[int, ...]
    initial: Initial
    role: str = "tuned"
    rate: float = 1.0


@dataclass
class Scope:
    """What a transform sees of the site it works on.

    Attributes:
        kind: of the site, of `KINDS`.
        shape: (..., n, m) of the weight in the source's orientation; widths of input and output of a sublayer.
        lookup: leaf -> value; decides whether the leaves are meta tensors, tensors or proxies.
        prefix: name of this step of the chain; leaves are called `<prefix>.<leaf>`.
        untouched: whether `w` is the frozen weight itself, the first of a chain.
        given: sizes that tuning has settled for this step (the rank that is left, the entries kept); see `size`.
        training: the lowering is for the train graph.
        penalties: collects what `penalty` is given: (name, scalar).
    """

    kind: str
    shape: tuple[int, ...]
    lookup: Callable[[Leaf], Value]
    prefix: str
    untouched: bool = True
    given: Mapping[str, int] = field(default_factory=dict)
    training: bool = False
    penalties: list[tuple[str, Value]] = field(default_factory=list, repr=False)

    @property
    def n(self) -> int:
        """Inputs of the weight, the n of y = xW with W of shape (n, m)."""
        return self.shape[-2]

    @property
    def m(self) -> int:
        """Outputs of the weight."""
        return self.shape[-1]

    def tuned(self, name: str, shape: int | tuple[int, ...], initial: Initial, rate: float = 1.0) -> Value:
        """Declare a tuned tensor of `shape` (a batch of weights gets one each) and return its value.

        `initial` is a number, a value of that shape, or a function of (shape, generator); `rate` is the tensor's
        learning rate over the run's.
        """
        return self._leaf(name, shape, initial, "tuned", rate)

    def tied(self, name: str, shape: tuple[int, ...], initial: Initial) -> Value:
        """Declare a tuned tensor that all sites of one shape share."""
        return self._shared("tied", self.shape, name, shape, initial, "tuned")

    def chosen(self, name: str, size: int, initial: Initial) -> Value:
        """Declare `size` indices (int64) that a selection decides and the adapter keeps; return their value."""
        return self._leaf(name, size, initial, "chosen")

    def frozen(self, name: str, shape: tuple[int, ...], initial: Initial) -> Value:
        """Declare a constant: drawn once for all sites, runs and seeds, so that no adapter has to hold it."""
        return self._shared("frozen", shape, name, shape, initial, "constant")

    def size(self, name: str, default: int) -> int:
        """A size that a budget may change while tuning, e.g. the rank that is left: the settled one, else `default`."""
        return self.given.get(name, default)

    def penalty(self, name: str, value: Value) -> None:
        """Add a scalar to the training loss; it is logged under `name`, summed over the sites."""
        self.penalties.append((name, value))

    def svd(self) -> tuple[Value, Value, Value]:
        """U (..., n, k), S (..., k), Vt (..., k, m) of the frozen weight, k = min(n, m); computed once, then constants.

        Raises:
            SpecError: the weight is already transformed, so its decomposition would change while training.
        """
        if not self.untouched:
            method = self.prefix.split(".")[-1]
            raise SpecError(f"{method} decomposes the frozen weight, so it must be the first of its chain")
        k = min(self.n, self.m)
        shapes = {"u": (self.n, k), "s": k, "vt": (k, self.m)}
        return tuple(self._leaf(name, shape, _factor(name), "constant") for name, shape in shapes.items())

    def _shared(self, how: str, by: tuple[int, ...], name: str, shape: tuple[int, ...], initial: Initial, role: str):
        """A leaf that is one for all sites where the method has the same `by`."""
        method, sizes = self.prefix.rpartition(".")[2], "x".join(map(str, by))
        return replace(self, prefix=f"{how}.{method}")._leaf(f"{name}_{sizes}", shape, initial, role)

    def _leaf(self, name: str, shape: int | tuple[int, ...], initial: Initial, role: str, rate: float = 1.0) -> Value:
        shape = (shape,) if isinstance(shape, int) else shape
        return self.lookup(Leaf(f"{self.prefix}.{name}", (*self.shape[:-2], *shape), initial, role, rate))


class _factor(str):
    """Start value of a constant leaf: the named factor of the weight's singular value decomposition."""


@dataclass(frozen=True)
class Method:
    """A registered transform: its name, class (reconstruction, extension, combination), options and function.

    Attributes:
        on: the kinds of site it stands on, of `KINDS`.
    """

    name: str
    kind: str
    function: Callable[..., Operator]
    options: type[BaseModel]
    on: tuple[str, ...]
    doc: str

    def __call__(self, w: Operator, site: Scope, options: BaseModel) -> Operator:
        return self.function(w, site, **{name: getattr(options, name) for name in type(options).model_fields})


METHODS: dict[str, Method] = {}


def transform(function: Callable[..., Operator] | None = None, *, on: tuple[str, ...] = ("matrix",)):
    """Register a method under its function's name; its keyword arguments become its validated options in a spec.

    Args:
        on: what it transforms, of `KINDS`: parameters that are a matrix (any parameter of two or more dimensions) or a
            vector, or a matrix of cross_attention; a layer's attention or feed_forward sublayer; the keys and values of
            attention; token embeddings.
    """
    if function is None:
        return lambda f: transform(f, on=on)
    fields = {
        name: (p.annotation, ... if p.default is p.empty else p.default)
        for name, p in inspect.signature(function).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }
    doc = inspect.cleandoc(function.__doc__)
    config = ConfigDict(extra="forbid", strict=True, frozen=True)
    options: Any = create_model(f"{function.__name__}_options", __config__=config, __doc__=doc, **fields)
    kind = function.__module__.rsplit(".", 1)[-1]
    kind = kind if kind in CLASSES else "combination"
    METHODS[function.__name__] = Method(function.__name__, kind, function, options, on, doc)
    return function


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """U(-1/sqrt(n), 1/sqrt(n)) for a factor of shape (..., n, r): Kaiming's with a = sqrt(5), as in LoRA (ref. 21)."""
    bound = 1 / math.sqrt(shape[-2])
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def he_uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """U(-sqrt(6/n), sqrt(6/n)) for a factor of shape (..., n, r): Kaiming's for ReLU, as in VeRA (arXiv 2310.11454)."""
    return math.sqrt(6) * kaiming_uniform(shape, generator)


def normal(deviation: float) -> Callable[[tuple[int, ...], torch.Generator], torch.Tensor]:
    """Start values drawn from N(0, deviation^2)."""
    return lambda shape, generator: deviation * torch.randn(shape, generator=generator)


def eye(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """The identity matrix of shape (..., r, r)."""
    return torch.eye(shape[-1]).expand(shape).clone()


def initial_value(leaf: Leaf, seed: int, svd: Callable[[], dict[str, torch.Tensor]]) -> torch.Tensor:
    """The start value of a leaf, on the CPU or where its value was computed; float32 where it is drawn.

    Raises:
        SpecError: indices that a selection has to choose first.

    The generator is seeded by the seed and the leaf's name, so a value does not depend on the order of the sites.
    """
    initial = leaf.initial
    if isinstance(initial, _factor):
        return svd()[str(initial)]
    if isinstance(initial, torch.Tensor):
        return initial.detach().clone()
    if callable(initial):
        key = f"{seed}:{leaf.name}" if leaf.role != "constant" else ".".join(leaf.name.split(".")[-2:])
        digest = hashlib.sha256(key.encode()).digest()
        return initial(leaf.shape, torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))
    return torch.full(leaf.shape, float(initial))


def compose(
    chain: Sequence[tuple[Method, BaseModel]],
    w: Operator,
    shape: tuple[int, ...],
    lookup: Callable[[Leaf], Value],
    name: str,
    kind: str = "matrix",
    given: Mapping[str, Mapping[str, int]] | None = None,
    training: bool = False,
    penalties: list[tuple[str, Value]] | None = None,
) -> Operator:
    """phi(W) of a chain, first to last (f, then g), with the leaves that `lookup` gives.

    Leaves are named `<name>.<method>.<leaf>`; a method's second use in one chain is `<method>_2`.

    Args:
        kind: of the site.
        given: `<name>.<method>` -> sizes that tuning has settled.
        training: lower for the train graph.
        penalties: filled with the penalties of the chain.

    Raises:
        SpecError: a method can't stand where it stands.
    """
    for i, (prefix, method, options) in enumerate(steps(chain, name)):
        sizes = (given or {}).get(prefix, {})
        scope = Scope(kind, shape, lookup, prefix, i == 0, sizes, training, [] if penalties is None else penalties)
        w = method(w, scope, options)
    return w


def steps(chain: Sequence[tuple[Method, BaseModel]], name: str) -> Iterator[tuple[str, Method, BaseModel]]:
    """The methods of a chain with the prefix of their leaves: `<name>.<method>`, `<name>.<method>_2`, ..."""
    for i, (method, options) in enumerate(chain):
        uses = sum(other.name == method.name for other, _ in chain[: i + 1])
        yield f"{name}.{method.name}" + (f"_{uses}" if uses > 1 else ""), method, options


def decompose(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Thin singular value decomposition of (..., n, m), in float32 or wider.

    Signs are fixed (the largest entry of every left vector is positive), so that a run elsewhere sees the same factors.
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    u, s, vt = torch.linalg.svd(wide, full_matrices=False)
    peak = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(u.dtype)
    return {"u": u * sign, "s": s, "vt": vt * sign.transpose(-2, -1)}


for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = [
    "METHODS",
    "Leaf",
    "Method",
    "Scope",
    "compose",
    "decompose",
    "initial_value",
    "kaiming_uniform",
    "steps",
    "transform",
]
