"""ONNX: a plain module becomes one file with named, dynamic inputs and outputs."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch import nn

from .errors import SubspanError
from .passes import copy_contiguous
from .trace import Inputs, capture

_LIMIT = 2_000_000_000


def export_onnx(
    module: nn.Module, inputs: Inputs, file: str | Path, opset: int = 18, metadata: dict[str, object] | None = None
) -> None:
    """Write a module, in eval mode, as ONNX; weights of more than 2 GB lie beside it in `<file>.data`.

    Inputs have the names of the module's keywords and outputs the names of its output's fields (`output_<i>` where it
    has none); dynamic dimensions have the names given in `inputs.dynamic`.

    Args:
        module: any module that `torch.export` traces.
        inputs: examples and dynamic dimensions.
        file: to write.
        opset: ONNX operator set, 18 or later.
        metadata: kept in the model's metadata; what is not text, as JSON.

    Raises:
        SubspanError: the module can't be traced, or uses what ONNX can't express.
        OSError: no space, no permission.
    """
    program = capture(module, inputs)
    copy_contiguous(program.graph_module.graph)
    program.graph_module.recompile()
    names = _names(program.call_spec.in_spec.child(1), "input")
    outputs = _names(program.call_spec.out_spec, "output")
    with _quiet():
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=names,
                output_names=outputs,
                optimize=True,
                verbose=False,
            )
        except Exception as error:
            cause = error.__cause__ or error
            reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
            raise SubspanError(f"can't export to ONNX: {reason.strip()}") from error
    found = made.model.opset_imports.get("", 0)
    if found != opset:
        raise SubspanError(
            f"the exporter can't write opset {opset} for this model; it wrote {found}: set export.onnx.opset"
        )
    proto = made.model_proto
    _rename(proto.graph, inputs)
    for key, value in (metadata or {}).items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    file = Path(file)
    large = proto.ByteSize() > _LIMIT
    onnx.save(proto, file, save_as_external_data=large, location=f"{file.name}.data" if large else None)


def _names(spec: torch.utils._pytree.TreeSpec, other: str) -> list[str]:
    """Names of the leaves of a pytree: keys of the outermost mapping, numbered where a key holds several."""
    keys = spec.context if isinstance(spec.context, list | tuple) and spec.type not in (list, tuple) else None
    if keys and isinstance(keys[0], list | tuple):
        keys = keys[0]
    names = []
    for i, child in enumerate(spec.children() if not spec.is_leaf() else [spec]):
        key = str(keys[i]) if keys else f"{other}_{i}"
        count = child.num_leaves
        names += [key] if count == 1 else [f"{key}_{k}" for k in range(count)]
    return names


def _rename(graph: onnx.GraphProto, inputs: Inputs) -> None:
    """Call the dynamic dimensions by the names given, wherever the exporter's symbols stand."""
    symbols = {}
    for key, value in zip(inputs.dynamic, graph.input, strict=False):
        found = next((i for i in graph.input if i.name == key), value)
        for dim, name in inputs.dynamic[key].items():
            if symbol := found.type.tensor_type.shape.dim[dim].dim_param:
                symbols[symbol] = name
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_param = symbols[dim.dim_param]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its steps; what fails comes as an exception."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
