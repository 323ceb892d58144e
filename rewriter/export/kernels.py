"""Kernels: whether every node of a file has one in ONNX Runtime's CUDA provider, for its type and operator set.

The table `cuda_kernels.json` is what the provider registers; `python -m pipelines.bench kernels` writes it on a machine
with a GPU.
"""

import contextlib
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime

from ..files import read_json

TABLE = Path(__file__).with_name("cuda_kernels.json")
_FLOATS = {ir.DataType.FLOAT: "float", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}


def registered() -> dict[str, list[list[Any]]]:
    """The CUDA provider's kernels: `domain:op` -> [first opset, last opset, floating types]; needs a GPU."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_registered_ep_kernel_defs

    onnxruntime.preload_dlls()
    library = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    with contextlib.suppress(Exception):  # It is registered already.
        onnxruntime.register_execution_provider_library("CUDAExecutionProvider", str(library))
    found: dict[str, dict[tuple[int, int], set[str]]] = {}
    for one in get_registered_ep_kernel_defs("CUDAExecutionProvider"):
        types = {kind for kinds in one.type_constraints.values() for kind in kinds}
        held = found.setdefault(f"{one.domain}:{one.op_name}", {}).setdefault(tuple(one.version_range), set())
        held |= {name for name in _FLOATS.values() if f"tensor({name})" in types}
    return {
        name: [[*versions, sorted(types)] for versions, types in sorted(kernels.items())]
        for name, kernels in sorted(found.items())
    }


@cache
def _table() -> dict[str, list[list[Any]]]:
    return read_json(TABLE)["kernels"]


def lacking(file: Path) -> list[str]:
    """Operators of a file that would leave the GPU: those without a kernel for their type, as `op (type)`."""
    model, found = ir.load(file), {}
    opsets = model.opset_imports
    for node in model.graph.all_nodes():
        values = [value for value in (*node.inputs, *node.outputs) if value is not None]
        types = {_FLOATS[value.dtype] for value in values if value.dtype in _FLOATS}
        kernels = _table().get(f"{node.domain}:{node.op_type}", [])
        version = node.version or opsets.get(node.domain, 1)
        if not any(first <= version <= last and types <= set(held) for first, last, held in kernels):
            found[f"{node.op_type} ({', '.join(sorted(types)) or 'integers'})"] = None
    return list(found)


def fallen(file: Path, session: onnxruntime.InferenceSession) -> list[str]:
    """Operators of an opened file that compute in floats on the CPU beside the GPU; those of shapes belong there."""
    floats = {
        node.name: node.op_type
        for node in ir.load(file).graph.all_nodes()
        if any(value.dtype in _FLOATS for value in node.outputs)
    }
    parts = session.get_provider_graph_assignment_info()
    names = [node.name for part in parts if part.ep_name == "CPUExecutionProvider" for node in part.get_nodes()]
    return sorted({floats[name] for name in names if name in floats})
