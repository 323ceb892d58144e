"""Tracing: a module becomes a `TracedModel`, one set of weights with a train and an eval graph over them."""

import contextlib
import inspect
from collections.abc import Collection, Iterator

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export import ExportedProgram

from .errors import SubspanError, reason
from .graph.traced import Inputs, Signature, TracedModel, copy_graph
from .passes.base import Context
from .passes.manager import run


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
    """A `TracedModel` takes any inputs; torch.export wants them named."""
    if not isinstance(model, TracedModel):
        yield
        return
    names = [*(f"args_{i}" for i in range(len(inputs.args))), *inputs.kwargs]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward = lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)  # noqa: E731
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


def trace(
    model: nn.Module,
    inputs: Inputs,
    modes: tuple[str, ...] = ("train", "eval"),
    without: Collection[str] = (),
    changed: dict[str, int] | None = None,
) -> TracedModel:
    """Trace a module in train and eval mode into one `TracedModel` that shares its tensors.

    Two traces, not one with flags flipped: a module may branch on `training` in ways no flag shows.

    Args:
        model: any module that `torch.export` traces; it is left as it was.
        inputs: examples and dynamic dimensions.
        modes: which graphs to make.
        without: names of passes to leave out.
        changed: how many nodes each pass changed, counted up.

    Raises:
        SubspanError: the module can't be traced.
    """
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    persistent = model.state_dict().keys()
    first: dict[int, str] = {}
    aliases = {name: first.setdefault(id(p), name) for name, p in parameters.items()}
    graphs, signatures, constants = {}, {}, {}
    for mode in modes:
        program = capture(model, inputs, training=mode == "train")
        module = program.module()
        graph = copy_graph(module.graph)
        for node in graph.find_nodes(op="call_module"):  # torch.export's guards, which are in no module of ours.
            graph.erase_node(node)
        for node in graph.find_nodes(op="get_attr"):
            if node.target not in parameters and node.target not in buffers:
                name = f"{node.target}" if mode == "eval" else f"{node.target}_train"
                constants[name] = _attribute(module, node.target)
                node.target = name
        graphs[mode] = run(graph, "trace", Context(mode), without, changed=changed)
        signatures[mode] = Signature(program.call_spec.in_spec, program.call_spec.out_spec)
    out = TracedModel(graphs, signatures, aliases)
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
