"""Tracing: a module becomes a `GraphModel`, one set of weights under their own names with a train and an eval graph."""

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from .errors import SubspanError, reason
from .passes import follow_device, remove_checks, remove_dead

# Key of an output node's meta: names of the penalties that follow the module's own outputs.
NAMES = "penalties"


@dataclass
class Inputs:
    """Example inputs of a module and which of their dimensions vary.

    Attributes:
        args, kwargs: tensors, as the module's forward takes them.
        dynamic: for each input (position or keyword), {dimension: name}, e.g. {"input_ids": {0: "batch"}}.
            Inputs left out have fixed shapes. Sizes of different names must differ in the examples.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic: Mapping[int | str, Mapping[int, str]] = field(default_factory=dict)

    def shapes(self) -> tuple[Any, ...] | dict[str, Any]:
        """The `dynamic_shapes` of torch.export."""
        marks = {key: {dim: Dim.DYNAMIC for dim in dims} for key, dims in self.dynamic.items()}
        return tuple(marks.get(i) for i in range(len(self.args))), {k: marks.get(k) for k in self.kwargs}

    def to(self, device: torch.device | str) -> "Inputs":
        """The same examples on another device."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), (self.args, self.kwargs))
        return Inputs(args, kwargs, self.dynamic)


def capture(model: nn.Module, inputs: Inputs, training: bool = False) -> ExportedProgram:
    """`torch.export` of a module, in train or eval mode, with dynamic shapes; works on the meta device too.

    Raises:
        SubspanError: the module can't be traced.
    """
    was_training = model.training
    args_shapes, kwargs_shapes = inputs.shapes()
    with _without_cache(model), _named_inputs(model, inputs):
        names = list(inspect.signature(model.forward).parameters)
        shapes = {name: shape for name, shape in zip(names, args_shapes, strict=False)} | kwargs_shapes
        model.train(training)
        try:
            # Copies, since one tensor given for two inputs would be traced as one input.
            args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (inputs.args, inputs.kwargs))
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise SubspanError(f"torch.export can't trace {type(model).__name__}: {reason(error)}") from error
        finally:
            model.train(was_training)


@contextlib.contextmanager
def _named_inputs(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """A `GraphModel` takes any inputs; torch.export wants them named."""
    if not isinstance(model, GraphModel):
        yield
        return
    names = [*(f"args_{i}" for i in range(len(inputs.args))), *inputs.kwargs]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward = lambda *args, **kwargs: GraphModel.forward(model, *args, **kwargs)  # noqa: E731
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    model.forward = forward
    try:
        yield
    finally:
        del model.forward


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """A key-value cache is no output of a training step; the configs that ask for one are set back afterwards."""
    configs = {
        id(m.config): m.config for m in model.modules() if getattr(getattr(m, "config", None), "use_cache", False)
    }
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


class GraphModel(nn.Module):
    """A traced module. It holds every parameter and buffer once, under its own name; `training` picks the graph.

    Attributes:
        graphs: {"train": Graph, "eval": Graph}; call `recompile` after changing one.
        aliases: parameter name -> the first name of the same tensor, for tied weights.
        tied: first name -> all names, where there is more than one.
        plan, base: of a rewritten module, its plan and the module it was made from (no submodule of it).
        penalties: name -> scalar, what the last forward in training mode adds to the loss.
    """

    def __init__(self, graphs: dict[str, fx.Graph], in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec):
        super().__init__()
        self.graphs, self.in_spec, self.out_spec = graphs, in_spec, out_spec
        self.aliases: dict[str, str] = {}
        self.plan: Any = None
        self.__dict__["base"] = None
        self.penalties: dict[str, torch.Tensor] = {}
        self._forwards: dict[str, Any] = {}
        self._penalty_names: dict[str, list[str]] = {}

    @property
    def tied(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name, first in self.aliases.items():
            names.setdefault(first, []).append(name)
        return {first: all_names for first, all_names in names.items() if len(all_names) > 1}

    @property
    def input_names(self) -> list[str]:
        """Names of the keyword inputs, in order."""
        return list(self.in_spec.child(1).context)

    def add(self, name: str, tensor: torch.Tensor, persistent: bool = True) -> None:
        """Register a parameter or buffer under a dotted name."""
        *path, last = name.split(".")
        module: nn.Module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(last, tensor)
        else:
            module.register_buffer(last, tensor, persistent=persistent)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "base":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def recompile(self) -> None:
        """Generate the forwards of both graphs anew."""
        for mode, graph in self.graphs.items():
            graph.lint()
            self._penalty_names[mode] = graph.output_node().meta.get(NAMES, [])
            self._forwards[mode] = type(fx.GraphModule(self, copy_graph(graph))).forward

    def clone(self) -> "GraphModel":
        """Copies of the graphs over the same tensors (no memory for weights); call `recompile` before use."""
        other = GraphModel(
            {mode: copy_graph(graph) for mode, graph in self.graphs.items()}, self.in_spec, self.out_spec
        )
        other.aliases, other.plan = dict(self.aliases), self.plan
        seen: dict[int, nn.Parameter] = {}
        for name, p in self.named_parameters(remove_duplicate=False):
            other.add(name, seen.setdefault(id(p), nn.Parameter(p.detach(), requires_grad=p.requires_grad)))
        persistent = self.state_dict().keys()
        for name, b in self.named_buffers(remove_duplicate=False):
            other.add(name, b, persistent=name in persistent)
        other.train(self.training)
        return other

    def forward(self, *args, **kwargs):
        """As the traced module's forward, with the inputs it was traced with."""
        if kwargs and list(kwargs) != self.input_names:
            wrong = sorted(set(kwargs) ^ set(self.input_names))
            if wrong:
                raise TypeError(f"inputs differ from the traced ones {self.input_names}: {wrong}")
            kwargs = {name: kwargs[name] for name in self.input_names}
        flat = pytree.tree_leaves((args, kwargs))
        mode = "train" if self.training else "eval"
        out = list(self._forwards[mode](self, *flat))
        count = self.out_spec.num_leaves
        self.penalties = dict(zip(self._penalty_names[mode], out[count:], strict=True))
        return pytree.tree_unflatten(out[:count], self.out_spec)


def assign(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Put new parameters in the place of the named ones and of all tied to them; the old tensors stay as they were.

    Args:
        values: name -> tensor of the parameter's shape; it is cast to the parameter's type and device.
    """
    named = dict(module.named_parameters(remove_duplicate=False))
    for name, value in values.items():
        old = named[name]
        new = nn.Parameter(value.detach().to(old.device, old.dtype).clone(), requires_grad=old.requires_grad)
        for alias in (alias for alias, parameter in named.items() if parameter is old):
            path, _, last = alias.rpartition(".")
            module.get_submodule(path).register_parameter(last, new)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy that keeps the nodes' meta."""
    new = fx.Graph()
    output = new.graph_copy(graph, {}, return_output_node=True)
    value, old = output
    new.output(value).meta = copy.copy(old.meta)
    return new


def trace(model: nn.Module, inputs: Inputs, modes: tuple[str, ...] = ("train", "eval")) -> GraphModel:
    """Trace a module in train and eval mode into one `GraphModel` that shares its tensors.

    Two traces, not one with flags flipped: a module may branch on `training` in ways no flag shows.

    Args:
        model: any module that `torch.export` traces; it is left as it was.
        inputs: examples and dynamic dimensions.
        modes: which graphs to make.

    Raises:
        SubspanError: the module can't be traced.
    """
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    persistent = model.state_dict().keys()
    first: dict[int, str] = {}
    aliases = {name: first.setdefault(id(p), name) for name, p in parameters.items()}
    graphs, constants = {}, {}
    for mode in modes:
        program = capture(model, inputs, training=mode == "train")
        module = program.module()
        graph = copy_graph(module.graph)
        for node in graph.find_nodes(op="get_attr"):
            if node.target not in parameters and node.target not in buffers:
                name = f"{node.target}" if mode == "eval" else f"{node.target}_train"
                constants[name] = _attribute(module, node.target)
                node.target = name
        graphs[mode] = remove_dead(follow_device(remove_checks(graph)))
    out = GraphModel(graphs, program.call_spec.in_spec, program.call_spec.out_spec)
    out.aliases = aliases
    shared: dict[int, nn.Parameter] = {}
    for name, p in parameters.items():
        out.add(name, shared.setdefault(id(p), nn.Parameter(p.detach(), requires_grad=p.requires_grad)))
    for name, b in buffers.items():
        out.add(name, b, persistent=name in persistent)
    for name, constant in constants.items():
        out.add(name, constant, persistent=False)
    out.train(model.training)
    out.recompile()
    return out


def _attribute(module: nn.Module, dotted: str) -> torch.Tensor:
    *path, last = dotted.split(".")
    for part in path:
        module = getattr(module, part)
    return getattr(module, last)
