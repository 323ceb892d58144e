"""Frozen weights that are not stored as they compute: every operator takes them as it takes a tensor.

An op with one makes it dense for as long as the op takes; autograd keeps what it is stored as for its backward.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, ClassVar, Self

import torch
import torch.utils._pytree as pytree
from torch import Tensor

aten = torch.ops.aten
Kept = Callable[..., Any]


class Stored(Tensor):
    """A frozen weight with the shape and the floating type of the dense one. Nothing is written to it, and it has no
    memory of its own.

    Attributes:
        kept: op -> a function of its arguments that leaves the weight stored, or reads a part of it alone; where it
            returns None the op is computed of the dense weight.
        together: whether all processes have to make it dense equally often.
    """

    kept: ClassVar[dict[Any, Kept]]
    together: ClassVar[bool] = False

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that it is held in, here."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The weight that it stands for."""
        raise NotImplementedError

    def of_parts(self) -> Callable[[Sequence[Tensor]], Tensor]:
        """A function from other `parts`, of these shapes, to what they stand for; it does not hold these."""
        raise NotImplementedError

    def again(self, fn: Callable[[Tensor], Tensor] = lambda one: one, flip: bool = False) -> Self:
        """The same with a function applied to all that it is held in.

        Args:
            flip: the last two dimensions the other way round.
        """
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        keeping = args[0].kept.get(func) if args and isinstance(args[0], Stored) else None
        found = None if keeping is None else keeping(*args, **kwargs)
        if found is not None:
            return found
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if argument.is_write and isinstance(value, Stored):
                raise NotImplementedError(f"{func} would write to a frozen weight that is stored otherwise")
        return cls.computed(func, args, kwargs)

    @classmethod
    def computed(cls, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What an op gives for the dense weights among its arguments."""
        args, kwargs = pytree.tree_map_only(Stored, lambda one: one.dense(), (args, kwargs))
        return func(*args, **kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl


class Elsewhere(Stored):
    """A frozen weight whose tensors are brought here, whole, each time that it is made dense.

    Attributes:
        held: what is held of the tensors that the weight is stored as.
        made: of those tensors, brought, the dense weight.
        flipped: whether the last two dimensions are the other way round.
    """

    held: tuple[Tensor, ...]
    made: Callable[[Sequence[Tensor]], Tensor]
    flipped: bool

    @staticmethod
    def __new__(
        cls,
        held: tuple[Tensor, ...],
        made: Callable[[Sequence[Tensor]], Tensor],
        like: Tensor,
        device: torch.device,
        flipped: bool = False,
    ) -> Self:
        out = Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device)
        out.held, out.made, out.flipped = held, made, flipped
        return out

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.held

    def brought(self) -> Sequence[Tensor]:
        """The tensors that the weight is stored as, on its device."""
        raise NotImplementedError

    def alike(self, held: tuple[Tensor, ...], like: Tensor, flipped: bool) -> Self:
        """The same weight of other tensors, with the shape and the strides of another."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        whole = self.made(self.brought())
        return whole.transpose(-2, -1) if self.flipped else whole

    def again(self, fn: Callable[[Tensor], Tensor] = lambda one: one, flip: bool = False) -> Self:
        like = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")
        like = like.transpose(-2, -1) if flip else like
        return self.alike(tuple(map(fn, self.held)), like, self.flipped != flip)


def _same(weight: Stored, *_: Any, **__: Any) -> Stored:
    return weight.again()


def _moved(weight: Stored, *, dtype=None, device=None, **_: Any) -> Stored | None:
    return weight.again(lambda one: one.to(device, copy=True)) if dtype in (None, weight.dtype) else None


def _flipped(weight: Stored, first: int = -2, second: int = -1) -> Stored | None:
    last_two = weight.ndim > 1 and {first % weight.ndim, second % weight.ndim} == {weight.ndim - 2, weight.ndim - 1}
    return weight.again(flip=True) if last_two else None


def _viewed(weight: Stored, shape: Any, **_: Any) -> Stored | None:
    asked = [own if size == -1 else size for size, own in zip(shape, weight.shape, strict=False)]
    return weight.again() if len(shape) == weight.ndim and asked == list(weight.shape) else None


Stored.kept = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten._to_copy.default: _moved,
    aten.t.default: _flipped,
    aten.transpose.int: _flipped,
    aten.view.default: _viewed,
    aten._unsafe_view.default: _viewed,
    aten.expand.default: _viewed,
}


def parts_of(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that one is held in: itself, unless it is stored otherwise."""
    return tensor.parts if isinstance(tensor, Stored) else (tensor,)


def maker_of(tensor: Tensor) -> Callable[[Sequence[Tensor]], Tensor]:
    """A function from tensors like `parts_of` one to what they stand for."""
    return tensor.of_parts() if isinstance(tensor, Stored) else itemgetter(0)


def held_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes here."""
    return sum(one.nbytes for one in parts_of(tensor))


def as_dense(tensor: Tensor) -> Tensor:
    """A tensor, dense where it is stored otherwise."""
    return tensor.dense() if isinstance(tensor, Stored) else tensor
