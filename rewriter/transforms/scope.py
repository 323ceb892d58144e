"""The scope: what a transform sees of the site it works on, and through which it declares its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import SpecError
from .leaf import Initial, Leaf, SvdFactor
from .schedule import Schedule

# What a transform can stand on. The first three are parameters; the others are found in the graph inside a module.
KINDS = ("matrix", "vector", "cross_attention", "attention", "feed_forward", "keys", "values", "embeddings")


@dataclass
class Scope:
    """What a transform sees of the site it works on.

    Attributes:
        kind: of the site, of `KINDS`.
        shape: (..., n, m) of the weight in the source's orientation; widths of input and output of a sublayer.
        lookup: leaf -> value; decides whether the leaves are meta tensors, tensors, or tensors under a trace.
        untouched: whether `w` is the frozen weight itself, the first of a chain.
        given: sizes that a schedule has settled; see `size`.
        training: the expression is for the train graph.
        penalties: collects what `penalty` is given: (name, scalar).
        schedules: collects what `schedule` is given: (name of the transform at its site, schedule).
    """

    kind: str
    shape: tuple[int, ...]
    lookup: Callable[[Leaf], Tensor]
    _name: str  # `<site>.<transform>`; an expression may not depend on it, since alike ones are traced once
    untouched: bool = True
    given: Mapping[str, int] = field(default_factory=dict)
    training: bool = False
    penalties: list[tuple[str, Tensor]] = field(default_factory=list, repr=False)
    schedules: list[tuple[str, Schedule]] = field(default_factory=list, repr=False)
    _declared: set[str] = field(default_factory=set, repr=False)

    @property
    def n(self) -> int:
        """Inputs of the weight, the n of y = xW with W of shape (n, m)."""
        return self.shape[-2]

    @property
    def m(self) -> int:
        """Outputs of the weight."""
        return self.shape[-1]

    @property
    def transform(self) -> str:
        """The transform's name in the chain."""
        return self._name.rpartition(".")[2]

    def tuned(
        self, name: str, shape: int | tuple[int, ...], initial: Initial, rate: float = 1.0, replaces: bool = False
    ) -> Tensor:
        """Declare a tuned tensor of `shape` (a batch of weights gets one each) and return its value.

        Args:
            initial: a number, a value of that shape, or a function of (shape, generator).
            rate: the tensor's learning rate over the run's.
            replaces: it stands in the weight's place, which is no part of the result any more.
        """
        return self._leaf(name, shape, initial, rate=rate, replaces=replaces)

    def tied(self, name: str, shape: tuple[int, ...], initial: Initial) -> Tensor:
        """Declare a tuned tensor that all sites of one shape share."""
        return self._shared("tied", self.shape, name, shape, initial)

    def chosen(
        self,
        name: str,
        size: int,
        initial: Initial,
        dtype: torch.dtype = torch.int64,
        below: int | None = None,
        distinct: bool = False,
    ) -> Tensor:
        """Declare a tensor of `size` entries (indices, or another `dtype`) that is not tuned but decided, by a schedule
        or by its start value, and kept in the adapter; return its value.

        Args:
            below, distinct: what an adapter's file is held to: entries of 0 to `below` - 1, each once.
        """
        return self._leaf(name, size, initial, "chosen", dtype=dtype, below=below, distinct=distinct)

    def frozen(self, name: str, shape: tuple[int, ...], initial: Initial, apart: bool = False) -> Tensor:
        """Declare a constant: drawn once for all sites, runs and seeds, so that no adapter has to hold it.

        Args:
            apart: every site holds its own, so that an adapter from elsewhere may bring others.
        """
        if apart:
            return self._leaf(f"{name}_{'x'.join(map(str, shape))}", shape, initial, "constant")
        batch = "x".join(map(str, self.shape[:-2]))
        return self._shared(f"frozen.{batch}" if batch else "frozen", shape, name, shape, initial, "constant")

    def size(self, name: str, default: int) -> int:
        """A size that a schedule may change, e.g. the rank that is left: the settled one, else `default`."""
        return self.given.get(name, default)

    def penalty(self, name: str, value: Tensor) -> None:
        """Add a scalar to the training loss; it is logged under `name`, summed over the sites."""
        self.penalties.append((name, value))

    def schedule(self, schedule: Schedule) -> None:
        """Declare what happens to this transform's tensors over the optimiser's steps. Equal ones are one pool."""
        self.schedules.append((self._name, schedule))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (..., n, k), S (..., k), Vt (..., k, m) of the frozen weight, k = min(n, m); computed once, then constants.

        Raises:
            SpecError: the weight is already transformed, so its decomposition would change while training.
        """
        self.check_first()
        k = min(self.n, self.m)
        shapes = {"u": (self.n, k), "s": k, "vt": (k, self.m)}
        return tuple(self._leaf(name, shape, SvdFactor(name), "constant") for name, shape in shapes.items())

    def check_first(self) -> None:
        """Refuse to stand on a weight that is already transformed.

        Raises:
            SpecError: it does.
        """
        if not self.untouched:
            raise SpecError(f"{self.transform} decomposes the frozen weight, so it must be the first of its chain")

    def divided(self, size: int, of: str = "inputs") -> int:
        """How many blocks of a size the inputs or outputs are.

        Raises:
            SpecError: they are no whole number of them.
        """
        width = self.n if of == "inputs" else self.m
        if width % size:
            raise SpecError(f"{self.transform}: {width} {of} are not whole blocks of {size}")
        return width // size

    def _shared(self, how: str, by: tuple[int, ...], name: str, shape: tuple[int, ...], initial: Initial, *role: str):
        """A leaf that is one for all sites where the transform has the same `by`."""
        sizes = "x".join(map(str, by))
        return self.lookup(Leaf(f"{how}.{self.transform}.{name}_{sizes}", (*self.shape[:-2], *shape), initial, *role))

    def _leaf(self, name: str, shape: int | tuple[int, ...], initial: Initial, role: str = "tuned", **more) -> Tensor:
        if name in self._declared:
            raise SpecError(f"{self.transform} declares the tensor {name!r} twice")
        self._declared.add(name)
        shape = (shape,) if isinstance(shape, int) else shape
        return self.lookup(Leaf(f"{self._name}.{name}", (*self.shape[:-2], *shape), initial, role, **more))
