"""Tracing: a module becomes a `TracedModel`, one set of weights with a train and an eval graph over them."""

import contextlib
import copy
import inspect
import io
import logging
import operator
import warnings
from collections.abc import Collection, Iterator, Mapping

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import ExportedProgram

from . import kept
from .algebra import Quantised
from .errors import SubspanError, reason
from .graph.ops import VIEWS, aten
from .graph.stored import Trace
from .graph.traced import Inputs, Range, Signature, TracedModel, copy_graph
from .passes.base import Context
from .passes.manager import run

_STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_ANY = 2**31


def capture(model: nn.Module, inputs: Inputs, training: bool = False) -> ExportedProgram:
    """`torch.export` of a module, in train or eval mode, with dynamic shapes; works on the meta device too.

    Batch norms keep the statistics that they have: in train mode too they compute as in eval mode.

    Raises:
        SubspanError: the module can't be traced, or changes its buffers while it trains.
    """
    args_shapes, kwargs_shapes = inputs.shapes()
    model = twin(model)
    with _without_cache(model), _named_inputs(model, inputs):
        names = list(inspect.signature(model.forward).parameters)
        shapes = {name: shape for name, shape in zip(names, args_shapes, strict=False)} | kwargs_shapes
        model.train(training)
        for one in model.modules() if training else ():
            if isinstance(one, _STATISTICS):  # Its statistics stay those that it was trained with.
                one.eval()
        try:
            # Copies, since one tensor given for two inputs would be traced as one input.
            args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (inputs.args, inputs.kwargs))
            with muted():
                program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise SubspanError(f"torch.export can't trace {type(model).__name__}: {_useful(error)}") from error
    moved = _moved(program) if training else []
    if moved:
        said = f"{type(model).__name__} changes its buffer {moved[0]} while it trains, which no adapter would hold"
        raise SubspanError(f"{said}; freeze it: the module that has it in eval mode, or without running statistics")
    return program


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """What torch and the libraries of ONNX print of their own steps, whole graphs among it, is kept back; what fails
    comes as an exception, whose line says enough."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _moved(program: ExportedProgram) -> list[str]:
    """Buffers that a program writes to."""
    graph = program.module().graph
    found = list(program.graph_signature.buffers_to_mutate.values())
    buffers = set(program.graph_signature.buffers)
    for node in graph.find_nodes(op="call_function", target=aten.batch_norm.default):
        found += [str(one.target) for one in node.args[3:5] if isinstance(one, fx.Node) and node.args[5]]
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            for one, argument in zip(node.args, node.target._schema.arguments, strict=False):
                if argument.is_write and isinstance(one, fx.Node):
                    found += [str(source.target) for source in _memory(one) if source.target in buffers]
    return found


def _memory(node: fx.Node) -> list[fx.Node]:
    """The attribute whose memory a node is a view of, if any."""
    while node.op == "call_function" and node.target in VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return [node] if node.op == "get_attr" else []


def twin(model: nn.Module) -> nn.Module:
    """The module again, over the same tensors: what tracing sets or a forward changes in it is not the caller's."""
    if isinstance(model, TracedModel):
        return model
    tensors = [*model.parameters(), *model.buffers()]
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception:  # Of any module: something in it can't be copied.
        return model


def _useful(error: Exception) -> str:
    """The line of torch.export's that says what is wrong; it often comes after one that says that something is."""
    lines = [line.strip(" -*") for line in str(error).splitlines()]
    found = next((line for line in lines if "specialized it to be a constant" in line), None)
    return found.partition(" If you")[0] if found else reason(error)


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
    inputs: Inputs | Mapping[str, Inputs],
    modes: tuple[str, ...] = ("train", "eval"),
    without: Collection[str] = (),
    changed: dict[str, int] | None = None,
    keep: bool = False,
) -> TracedModel:
    """Trace a module in train and eval mode into one `TracedModel` that shares its tensors.

    Two traces, not one with flags flipped: a module may branch on `training` in ways no flag shows. A module on the
    meta device is traced as if it were on the CPU, so that its graphs are those that a run has.

    Args:
        model: any module that `torch.export` traces; it is left as it was.
        inputs: examples and dynamic dimensions; {mode: them} where the modes read different ones.
        modes: which graphs to make.
        without: names of passes to leave out.
        changed: how many nodes each pass changed, counted up.
        keep: take graphs from the cache, and keep them there; not for a module whose forward reads what is neither in
            it nor in its inputs.

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
        own = inputs if isinstance(inputs, Inputs) else inputs[mode]
        key = kept.key_of(model, own, mode, without) if keep and changed is None else None
        one = kept.load(key, own) if key else None
        if one is None:
            one = _traced(model, own, mode, without, changed)
            if key:
                kept.save(key, one, own)
        graphs[mode], signatures[mode] = one.graph, one.signature
        constants |= one.constants
    out = TracedModel(graphs, signatures, aliases)
    out.config = getattr(model, "config", None)
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


def _traced(
    model: nn.Module, inputs: Inputs, mode: str, without: Collection[str], changed: dict[str, int] | None
) -> Trace:
    hollow = _hollow(model)
    program = capture(hollow, inputs.to("cpu") if hollow is not model else inputs, training=mode == "train")
    module = program.module()
    graph = copy_graph(module.graph)
    for node in graph.find_nodes(op="call_module"):  # torch.export's guards, which are in no module of ours.
        graph.erase_node(node)
    _inline(graph, module)
    own = {name for some in (model.named_parameters, model.named_buffers) for name, _ in some(remove_duplicate=False)}
    constants = {}
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in own:
            name = f"{node.target}" if mode == "eval" else f"{node.target}_train"
            constants[name] = _attribute(module, node.target)
            node.target = name
    graph = run(graph, "trace", Context(mode), without, changed=changed)
    conditions = getattr(program, "_guards_code", None)
    return Trace(graph, _signature(program, module), constants, None if conditions is None else tuple(conditions))


def _hollow(model: nn.Module) -> nn.Module:
    """A module on the meta device, or with quantised weights, again: those are dense tensors on the CPU that take no
    memory. Any other one as it is."""
    tensors = [*model.parameters(), *model.buffers()]
    quantised = [one for one in tensors if isinstance(one, Quantised)]
    if not tensors or not (quantised or all(tensor.is_meta for tensor in tensors)):
        return model
    memo: dict[int, torch.Tensor] = {id(one): one for one in tensors}
    for tensor in tensors if tensors[0].is_meta else quantised:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        empty.untyped_storage().resize_(0)
        own = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if own else empty
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # Of any module: something in it can't be copied.
        return model


def _inline(graph: fx.Graph, module: nn.Module) -> None:
    """Put what torch.export keeps as modules, regions without gradients or under autocast, into the graph. In place.

    Raises:
        SubspanError: a region computes in another type of its own.
    """
    for node in list(graph.nodes):
        kind = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if kind not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            continue
        place = next(i for i, one in enumerate(node.args) if isinstance(one, fx.Node))
        body, operands = node.args[place], node.args[place + 1 :]
        if kind == "wrap_with_autocast" and node.args[2]:
            raise SubspanError(f"a part of the model computes under autocast ({node.args[1]}); trace it without")
        inner = module.get_submodule(body.target).graph
        copies = dict(zip(inner.find_nodes(op="placeholder"), operands, strict=True))
        with graph.inserting_before(node):
            out = graph.graph_copy(inner, copies)
            if kind == "wrap_with_set_grad_enabled" and not node.args[0]:
                out = fx.map_arg(out, lambda one: _detached(graph, one))
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise SubspanError(
                    f"the model uses the outputs of a region without gradients as a whole ({user.target})"
                )
            user.replace_all_uses_with(out[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not body.users:
            graph.erase_node(body)


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    made = graph.call_function(aten.detach.default, (node,))
    made.meta = dict(node.meta)
    return made


def _signature(program: ExportedProgram, module: nn.Module) -> Signature:
    """The nesting of a program's inputs and outputs, and what it is valid for."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    ranges = []
    for place, node in enumerate(placeholders):
        value = node.meta.get("val")
        for dimension, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            bounds = isinstance(size, torch.SymInt) and program.range_constraints.get(size.node.expr)
            if bounds:
                most = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < _ANY else None
                ranges.append(Range(place, str(node.target), dimension, int(bounds.lower), most))
    guard = None
    for node in module.graph.find_nodes(op="call_module"):
        order, check = [placeholders.index(one) for one in node.args], module.get_submodule(node.target)
        guard = lambda *leaves, order=order, check=check: check(*(leaves[i] for i in order))  # noqa: E731
    return Signature(program.call_spec.in_spec, program.call_spec.out_spec, tuple(ranges), guard)


def _attribute(module: nn.Module, dotted: str) -> torch.Tensor:
    *path, last = dotted.split(".")
    for part in path:
        module = getattr(module, part)
    return getattr(module, last)
