"""How a folder of PEFT has a transform, declared beside its expression: `@transform(kind, peft=Peft(...))`."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .leaf import Leaf

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Place:
    """A weight W (n, m) with the options that a transform has there.

    Attributes:
        values: leaf -> value.
        weight: W itself, where it is at hand.
        further: the module's tensors in the folder, by their names there.
        batch: how many of them there are, of a parameter that is a batch of weights (experts).
        bias: the layer's.
        kind: of the site.
        number, count: of the module among those that are tuned so, in the model's order, and how many they are.
        turn: of keys that positions rotate: R (head width, head width), a key at a position times R^t is that at the
            rows' number of positions on.
    """

    n: int
    m: int
    options: Any
    values: Tensors = field(default_factory=dict)
    weight: Tensor | None = None
    further: Tensors = field(default_factory=dict)
    batch: int | None = None
    bias: Tensor | None = None
    kind: str = "matrix"
    number: int = 0
    count: int = 1
    turn: Tensor | None = None


View = Callable[[Tensor, Place], Tensor]


@dataclass(frozen=True)
class Stored:
    """A leaf as PEFT stores it.

    Attributes:
        name: of its tensor, after the module's path.
        ours, theirs: from PEFT's tensor to the leaf's value, and back; `theirs` is None where PEFT computes it.
        shared: there is one for all modules, without a path.
        needed: every module has it.
        ending: there is one for each of these, without a path: what stands after its name and a dot, by a module's path
            and its number in the model's order.
        parts: there are several of a module, numbered after a dot; `ours` takes a tuple of them, `theirs` gives one.
        joined: one of all modules that share it, from (value, place) of each; instead of `theirs`.
        size: of what is shared, by the most inputs and the most outputs that a module has, and the options.
    """

    name: str
    ours: View
    theirs: View | None
    shared: bool = False
    needed: bool = True
    ending: Callable[[str, int], str] | None = None
    parts: bool = False
    joined: Callable[[Sequence[tuple[Tensor, Place]]], Tensor] | None = None
    size: Callable[[int, int, Any], tuple[int, ...]] | None = None

    @property
    def pathless(self) -> bool:
        return self.shared or self.ending is not None

    def called(self, module: str, number: int) -> str:
        """Its name in the folder, without the module's path."""
        return f"{self.name}.{self.ending(module, number)}" if self.ending else self.name


def same(name: str, needed: bool = True) -> Stored:
    """Stored as the leaf is."""
    return Stored(name, lambda value, _: value, lambda value, _: value, needed=needed)


def transposed(name: str, needed: bool = True) -> Stored:
    """Stored with its last two dimensions swapped."""
    return Stored(name, lambda value, _: value.mT, lambda value, _: value.mT, needed=needed)


def reshaped(name: str, ours: Callable[[Place], tuple], theirs: Callable[[Place], tuple]) -> Stored:
    """Stored in another shape, with the same entries in the same order."""
    return Stored(name, lambda value, at: value.reshape(ours(at)), lambda value, at: value.reshape(theirs(at)))


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


def _always(*_: Any) -> bool:
    return True


@dataclass(frozen=True)
class Peft:
    """PEFT's counterpart of a transform.

    Attributes:
        kind: its `peft_type`.
        read_as: others whose folders hold the same.
        tensors: leaf -> how it is stored.
        options: option -> key of `adapter_config.json` with the same value.
        fits: whether it is this transform, by the configuration and a module's tensors.
        read: more options, from the same; raises ValueError with what no option can say.
        write: more of the configuration, from the options; raises ValueError with what PEFT can't say.
        fixed: key -> the values with which it computes the same.
        ignored: keys that change nothing of what is computed, `fixed` and those of every kind apart.
        patterns: key -> the key that holds other values of it by module.
        after_dot: what these expressions match comes after a dot.
        made: leaf -> its value by the configuration, where PEFT draws it from a seed.
        further: names of other tensors that a module has, which follow from its weight or are of its bias.
        beside: those that follow from the weight and the leaves, to write.
        tables: leaf -> how it is stored for an embedding.
        bias: what becomes of the layer's bias; None: nothing. It is never trained so here: the bias is tuned freely.
        biases: value of `bias` with which PEFT tunes the biases of adapted layers alone; None: not compared.
        bias_parts: from the layer's bias as it was and as it is tuned, and the place, to further tensors that say so.
        listed: the key that lists the modules of this transform beside all.
        by_module: (leaf's value, options) -> (pattern's key, the end of the module's key, what stands there).
        sizes: from a module's tensors to the sizes that a schedule has settled.
        finds: what PEFT finds of the base by itself, so that it has another than is tuned here.
        factors: leaves A and B, where it is W + A B with its other options as by default.
        batched: whether a module's tensors can be those of a batch of weights of a shape (b, n, m) or (b, m, n); None:
            PEFT has none of a batch.
        whole: it stands for the parameter itself, which is stored by its own name.
        moves: the option with which rows take positions, as PEFT's rows before keys and values do.
        rows: it stands before the embeddings, or before the keys and values of all layers; its tensors have no path.
    """

    kind: str
    tensors: Mapping[str, Stored]
    options: Mapping[str, str] = field(default_factory=dict)
    fits: Callable[[Config, Tensors], bool] = _always
    read: Callable[[Config, Tensors], dict[str, Any]] = _nothing
    write: Callable[[Any], dict[str, Any]] = _nothing
    fixed: Mapping[str, tuple] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    patterns: Mapping[str, str] = field(default_factory=dict)
    after_dot: bool = False
    made: Mapping[str, Callable[[Config, Place], Tensor]] = field(default_factory=dict)
    further: tuple[str, ...] = ()
    beside: Callable[[Place], dict[str, Tensor]] | None = None
    tables: Mapping[str, Stored] = field(default_factory=dict)
    bias: Callable[[Tensor, Place], Tensor] | None = None
    bias_parts: Callable[[Tensor, Tensor, Place], dict[str, Tensor]] | None = None
    biases: str | None = None
    listed: str | None = None
    by_module: Callable[[Tensors, Any], tuple[str, str, Any]] | None = None
    sizes: Callable[[Tensors], dict[str, int]] | None = None
    finds: str | None = None
    factors: tuple[str, str] | None = None
    batched: Callable[[Tensors, tuple[int, ...]], bool] | None = None
    whole: bool = False
    moves: str | None = None
    rows: bool = False
    read_as: tuple[str, ...] = ()


_SIZES = re.compile(r"_\d+(x\d+)*$")
RANKS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}


def short_name(leaf: Leaf) -> str:
    """The name of a leaf in its transform."""
    name = leaf.name.rpartition(".")[2]
    return _SIZES.sub("", name) if leaf.role == "constant" or leaf.name.startswith("tied.") else name


def stored_by(peft: Peft, table: bool) -> Mapping[str, Stored]:
    """Leaf -> how it is stored, for an embedding or for another layer."""
    return peft.tables if table else peft.tensors
