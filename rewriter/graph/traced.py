"""Traced models: one set of weights under their own names, with graphs over them by name."""

import copy
import ctypes
import mmap
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import Dim

from ..algebra import parts_of
from ..errors import SubspanError, reason

_PAGEOUT = 21  # MADV_PAGEOUT: only a hint, whatever the memory is.


@dataclass
class Inputs:
    """Example inputs of a module and which of their dimensions vary.

    Attributes:
        args, kwargs: tensors, or lists of tensors that vary alike, as the module's forward takes them.
        dynamic: for each input (position or keyword), {dimension: name}, e.g. {"input_ids": {0: "batch"}}.
            Inputs left out have fixed shapes. Sizes of different names must differ in the examples.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic: Mapping[int | str, Mapping[int, str]] = field(default_factory=dict)

    def shapes(self) -> tuple[Any, ...] | dict[str, Any]:
        """The `dynamic_shapes` of torch.export."""
        marks = {key: {dim: Dim.DYNAMIC for dim in dims} for key, dims in self.dynamic.items()}
        some = lambda key, value: [marks.get(key)] * len(value) if isinstance(value, list) else marks.get(key)  # noqa: E731
        return tuple(some(i, x) for i, x in enumerate(self.args)), {k: some(k, x) for k, x in self.kwargs.items()}

    def to(self, device: torch.device | str) -> "Inputs":
        """The same examples on another device; zeros of the same shapes where they were on the meta device."""
        moved = lambda x: torch.zeros_like(x, device=device) if x.is_meta else x.to(device)  # noqa: E731
        args, kwargs = pytree.tree_map_only(torch.Tensor, moved, (self.args, self.kwargs))
        return Inputs(args, kwargs, self.dynamic)


@dataclass(frozen=True)
class Range:
    """A dimension of an input that may vary.

    Attributes:
        place: of the input among the flat ones.
        name: of the input.
        dimension: which of its dimensions.
        least, most: sizes that the trace is valid for; None: any.
    """

    place: int
    name: str
    dimension: int
    least: int
    most: int | None


@dataclass(frozen=True)
class Signature:
    """How a graph's flat inputs and outputs are nested, as the module takes and returns them, and what inputs it is
    valid for.

    Attributes:
        inputs, outputs: their nesting.
        ranges: sizes that the trace allows, of every dimension that may vary.
        guard: of the flat inputs; AssertionError where the trace took another turn for such sizes.
    """

    inputs: pytree.TreeSpec
    outputs: pytree.TreeSpec
    ranges: tuple[Range, ...] = ()
    guard: Callable[..., Any] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the keyword inputs, in order."""
        return list(self.inputs.child(1).context)


class Lowered(dict):
    """What was traced for one model, by graph; a copy of the model starts with nothing."""

    def __deepcopy__(self, memo: dict) -> "Lowered":
        return Lowered()


class TracedModel(nn.Module):
    """A traced module. It holds every parameter and buffer once, under its own name, and graphs that read them.

    Attributes:
        graphs: name -> graph; `train` and `eval` are what `forward` runs. Call `recompile` after changing one.
        signatures: name -> nesting of that graph's inputs and outputs.
        aliases: parameter name -> the first name of the same tensor, for tied weights.
        tied: first name -> all names, where there is more than one.
        lowered: graph's name -> what rewrites of this model have traced, for the next one.
        config: of the module that was traced, where it is one of transformers'.
    """

    def __init__(self, graphs: dict[str, fx.Graph], signatures: dict[str, Signature], aliases: dict[str, str]):
        super().__init__()
        self.graphs, self.signatures, self.aliases = graphs, signatures, aliases
        self.lowered = Lowered()
        self.config: Any = None
        self._forwards: dict[str, Any] = {}

    @property
    def tied(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name, first in self.aliases.items():
            names.setdefault(first, []).append(name)
        return {first: all_names for first, all_names in names.items() if len(all_names) > 1}

    @property
    def varies(self) -> bool:
        """Whether a sequence (dimension 1 of an input) may have another length than in the trace."""
        return any(one.dimension == 1 for signature in self.signatures.values() for one in signature.ranges)

    @property
    def longest(self) -> int | None:
        """The longest sequence that every graph is valid for; None: any."""
        found = [one.most for signature in self.signatures.values() for one in signature.ranges if one.dimension == 1]
        return min((most for most in found if most is not None), default=None)

    @property
    def input_names(self) -> list[str]:
        """Names of the keyword inputs, in order, of the graph that `forward` runs (or of the only one)."""
        own = self.signatures.get("train" if self.training else "eval")
        return (own or next(iter(self.signatures.values()))).names

    def read(self) -> set[str]:
        """The parameters that any graph reads, under all their names."""
        named = {self.aliases.get(node.target) for graph in self.graphs.values() for node in graph.nodes if node.users}
        return {name for name, first in self.aliases.items() if first in named}

    def add(self, name: str, tensor: torch.Tensor, persistent: bool = True) -> None:
        """Register a parameter or buffer under a dotted name."""
        *path, last = name.split(".")
        module: nn.Module = self
        for part in path:
            children = dict(module.named_children())
            if part not in children:
                children[part] = nn.Module()
                module.add_module(part, children[part])
            module = children[part]
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(last, tensor)
        else:
            module.register_buffer(last, tensor, persistent=persistent)

    def share(self, other: "TracedModel") -> None:
        """Register another model's parameters and buffers here too: new parameters over the same memory."""
        seen: dict[int, nn.Parameter] = {}
        for name, p in other.named_parameters(remove_duplicate=False):
            self.add(name, seen.setdefault(id(p), nn.Parameter(p.detach(), requires_grad=p.requires_grad)))
        persistent = other.state_dict().keys()
        for name, b in other.named_buffers(remove_duplicate=False):
            self.add(name, b, persistent=name in persistent)

    def recompile(self) -> None:
        """Generate the forwards of all graphs anew."""
        for name, graph in self.graphs.items():
            graph.lint()
            self._forwards[name] = type(fx.GraphModule(self, graph)).forward
            graph.owning_module = None  # It is this module's, whose tensors may change.

    def clone(self, *names: str) -> Self:
        """Copies of the graphs (or of the named ones) over the same tensors; call `recompile` before use."""
        other = self._with({name: copy_graph(self.graphs[name]) for name in names or self.graphs})
        other.share(self)
        other.train(self.training)
        return other

    def _with(self, graphs: dict[str, fx.Graph]) -> Self:
        """A model like this one with other graphs and no tensors yet."""
        other = TracedModel(graphs, dict(self.signatures), dict(self.aliases))
        other.lowered, other.config = self.lowered, self.config
        return other

    def run(self, name: str, *args, **kwargs) -> Any:
        """Run a graph by its name, with the inputs it was traced with.

        Raises:
            TypeError: inputs of other names.
            SubspanError: there is no such graph.
        """
        out = self._flat(name, args, kwargs)
        return pytree.tree_unflatten(out, self.signatures[name].outputs)

    def _flat(self, name: str, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
        if name not in self._forwards:
            raise SubspanError(f"no {name} graph was traced, only {', '.join(self._forwards)}")
        names = self.signatures[name].names
        if kwargs and list(kwargs) != names:
            wrong = sorted(set(kwargs) ^ set(names))
            if wrong:
                raise TypeError(f"inputs differ from the traced ones {names}: {wrong}")
            kwargs = {name: kwargs[name] for name in names}
        leaves = pytree.tree_leaves((args, kwargs))
        if not torch.compiler.is_compiling():
            self.check_valid(name, leaves)
        return list(self._forwards[name](self, *leaves))

    @property
    def rows(self) -> int:
        """Rows that are put before the tokens inside."""
        return 0

    @property
    def taken(self) -> int:
        """Positions that no text has: those of rows that are put before it."""
        return 0

    def check_valid(self, name: str, leaves: list[Any]) -> None:
        """Refuse inputs that the trace of a graph is not valid for.

        Args:
            name: of the graph.
            leaves: its flat inputs.

        Raises:
            SubspanError: with the size that it took another turn at.
        """
        signature = self.signatures[name]
        for one in signature.ranges:
            size = leaves[one.place].shape[one.dimension] + (self.taken if one.dimension == 1 else 0)
            if one.most is not None and size > one.most:
                said = f"{one.name} has size {size} in dimension {one.dimension}; the trace is valid up to {one.most}"
                raise SubspanError(f"{said}: beyond, the model computes something else")
        if signature.guard is not None and leaves and not leaves[0].is_meta:
            try:
                signature.guard(*leaves)
            except AssertionError as error:
                said = f"the trace is not valid for these inputs ({reason(error)}): the model computes something else"
                raise SubspanError(f"{said} for them; trace it with inputs of these sizes") from None

    def forward(self, *args, **kwargs):
        """As the traced module's forward, with the inputs it was traced with."""
        return self.run("train" if self.training else "eval", *args, **kwargs)


def assign(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Put new parameters in the place of the named ones and of all tied to them; the old tensors stay as they were.

    Args:
        values: name -> tensor of the parameter's shape: a parameter is put as it is, of another tensor a copy in the
            type and on the device of the old one.
    """
    named = dict(module.named_parameters(remove_duplicate=False))
    for name, value in values.items():
        old = named[name]
        new = value
        if not isinstance(value, nn.Parameter):
            copied = value.detach().to(old.device, old.dtype).clone(memory_format=torch.contiguous_format)
            new = nn.Parameter(copied, requires_grad=old.requires_grad)
        for alias in (alias for alias, parameter in named.items() if parameter is old):
            path, _, last = alias.rpartition(".")
            module.get_submodule(path).register_parameter(last, new)


def released(tensor: torch.Tensor) -> None:
    """Say that a tensor won't be read soon: of a mapped file the system may drop its pages now, where it is Linux."""
    for part in parts_of(tensor) if tensor.device.type == "cpu" and sys.platform == "linux" else ():
        start = -(-part.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (part.data_ptr() + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _PAGEOUT)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy that keeps the nodes' meta."""
    new = fx.Graph()
    output = new.graph_copy(graph, {}, return_output_node=True)
    value, old = output
    new.output(value).meta = copy.copy(old.meta)
    return new
