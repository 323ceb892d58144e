"""ONNX: a plain module becomes one file with named, dynamic inputs and outputs."""

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from torch import nn

from ..errors import SubspanError, reason
from ..graph.traced import Inputs
from ..passes.base import Context
from ..passes.manager import run
from ..trace import capture, muted

LIMIT = 1_000_000_000  # bytes; protobuf holds twice that, and writing it takes four times that in memory


def export_onnx(
    module: nn.Module,
    inputs: Inputs,
    file: str | Path,
    opset: int = 18,
    metadata: dict[str, object] | None = None,
    without: Collection[str] = (),
    called: Mapping[str, str] | None = None,
    optional: Collection[str] = (),
) -> None:
    """Write a module, in eval mode, as ONNX; weights of more than 1 GB lie beside it in `<file>_data`.

    Inputs have the names of the module's parameters and outputs the names of its output's fields (`output_<i>` where it
    has none); dynamic dimensions have the names given in `inputs.dynamic`.

    Args:
        module: any module that `torch.export` traces.
        inputs: examples and dynamic dimensions.
        file: to write.
        opset: ONNX operator set, 18 or later.
        metadata: kept in the model's metadata; what is not text, as JSON.
        without: names of passes to leave out.
        called: other names of inputs and outputs; of a list they are `<name>_<i>`.
        optional: parameters and buffers that are inputs too, with their values as defaults.

    Raises:
        SubspanError: the module can't be traced, or uses what ONNX can't express.
        OSError: no space, no permission.
    """
    program = capture(module, inputs)
    run(program.graph_module.graph, "export", Context("eval"), without)
    program.graph_module.recompile()
    with muted():
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=list(program.graph_signature.user_inputs),
                output_names=_names(program.call_spec.out_spec),
                optimize=False,
                verbose=False,
            )
            weights = list(made.model.graph.initializers.values())
            made.model.graph.inputs.extend(value for value in weights if value.name in optional)
            made.optimize()
        except Exception as error:
            raise SubspanError(f"can't export to ONNX: {reason(error.__cause__ or error)}") from error
    if (found := made.model.opset_imports.get("", 0)) != opset:
        said = f"the exporter can't write opset {opset} for this model; it wrote {found}"
        raise SubspanError(f"{said}: set export.onnx.opset")
    _rename(made.model.graph, inputs)
    for value in (*made.model.graph.inputs, *made.model.graph.outputs):
        value.name = (called or {}).get(value.name, value.name)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
    made.model.metadata_props.update(texts)
    with muted():
        save(made.model, Path(file))
    for value in weights:
        value.const_value = None


def _names(spec: torch.utils._pytree.TreeSpec) -> list[str]:
    """Names of an output's leaves: keys of the outermost mapping, numbered where a key holds several."""
    keys = spec.context if isinstance(spec.context, list | tuple) and spec.type not in (list, tuple) else None
    if keys and isinstance(keys[0], list | tuple):
        keys = keys[0]
    names = []
    for i, child in enumerate(spec.children() if not spec.is_leaf() else [spec]):
        key = str(keys[i]) if keys else f"output_{i}"
        count = child.num_leaves
        names += [key] if count == 1 else [f"{key}_{k}" for k in range(count)]
    return names


def _rename(graph: onnx_ir.Graph, inputs: Inputs) -> None:
    """Call the dynamic dimensions by the names given, wherever the exporter's symbols stand."""
    symbols: dict[str, str] = {}
    by_key = dict(enumerate(graph.inputs)) | {value.name: value for value in graph.inputs}
    for key, axes in inputs.dynamic.items():
        given = inputs.kwargs.get(key)
        of_list = [f"{key}_{i}" for i in range(len(given))] if isinstance(given, list) else [key]
        for one in of_list:
            for dim, name in axes.items():
                if isinstance(symbol := by_key[one].shape[dim], onnx_ir.SymbolicDim) and symbol.value:
                    symbols[symbol.value] = name
    words = re.compile("|".join(rf"\b{re.escape(one)}\b" for one in symbols) or "(?!)")
    inner = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *inner):
        if value.shape is not None:
            value.shape = onnx_ir.Shape([_renamed(dim, words, symbols) for dim in value.shape])


def _renamed(dim: Any, words: re.Pattern[str], symbols: Mapping[str, str]) -> Any:
    """A dimension, or an expression of several, by the names given; a sum in one order, so that equal ones read so."""
    if not isinstance(dim, onnx_ir.SymbolicDim) or not dim.value:
        return dim
    named = words.sub(lambda found: symbols[found[0]], dim.value)
    terms = named.split(" + ")
    return " + ".join(sorted(terms)) if all(term.isidentifier() for term in terms) else named


def save(model: onnx_ir.Model, file: Path) -> None:
    """Write a model and let go of its weights; those of more than a file of protobuf holds lie beside it in
    `<file>_data`."""
    large = sum(value.const_value.nbytes for value in model.graph.initializers.values()) > LIMIT
    onnx_ir.save(model, file, external_data=data_of(file).name if large else None)
    for value in model.graph.initializers.values():  # onnxscript's rules hold on to the last graph that they matched.
        value.const_value = None


def data_of(file: Path) -> Path:
    """Where the weights of a large ONNX file lie."""
    return file.with_name(f"{file.name}_data")


def files_of(file: Path) -> list[Path]:
    """An ONNX file and, if there is one, the file of its weights."""
    return [one for one in (file, data_of(file)) if one.exists()]


def placed(file: Path, place: Path) -> None:
    """The same model under another name, its weights beside it: links, and copies on file systems without links."""
    if data_of(file).exists():
        locate(file, place)
        _linked(data_of(file), data_of(place))
    else:
        _linked(file, place)


def locate(file: Path, place: Path) -> None:
    """Write a file's graph elsewhere, saying that its weights lie beside it there."""
    model = onnx.load(file, load_external_data=False)
    for value in model.graph.initializer:
        for entry in value.external_data:
            if entry.key == "location":
                entry.value = data_of(place).name
    onnx.save(model, place)


def _linked(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


def size_of(file: Path) -> int:
    """Bytes of an ONNX file and of its weights."""
    return sum(one.stat().st_size for one in files_of(file))
