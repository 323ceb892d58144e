"""Verify: the same inputs through every stage from the tuned graph to ONNX Runtime, and the largest difference."""

import ast
import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..errors import SubspanError, reason
from ..graph.traced import Inputs
from .onnx import size_of

Stage = Callable[[dict[str, Tensor]], list[np.ndarray]]
PAST, PRESENT = "past_key_values", "present"
LARGE = 2**31  # bytes
BATCHES, LENGTHS = (1, 2, 5), (3, 16, 33)


def batches(inputs: Inputs, vocabulary: int, longest: int | None = None, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Random inputs of several batch sizes and lengths; rows of different lengths are padded on the right.

    Args:
        inputs: examples; integers become token ids below `vocabulary`, `attention_mask` marks the padding.
        vocabulary: number of token ids.
        longest: longest sequence that the model takes.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = sorted({min(n, longest or n) for n in LENGTHS})
    sequences = any("sequence" in axes.values() for axes in inputs.dynamic.values())
    for size in BATCHES:
        for length in lengths if sequences else lengths[:1]:
            sizes = {"batch": size, "sequence": length, "decoder_sequence": max(2, length // 2 + 1)}
            real = torch.randint(1, length + 1, (size,), generator=generator)
            real[0] = length
            mask = (torch.arange(length)[None, :] < real[:, None]).long()
            yield {
                name: _fill(name, example, inputs.dynamic.get(name, {}), sizes, mask, vocabulary, generator)
                for name, example in inputs.kwargs.items()
            }


def _fill(
    name: str,
    example: Tensor,
    axes: Mapping[int, str],
    sizes: dict[str, int],
    mask: Tensor,
    vocabulary: int,
    generator: torch.Generator,
) -> Tensor:
    shape = [sizes.get(axes.get(dim), size) for dim, size in enumerate(example.shape)]
    if name == "attention_mask":
        return mask
    if name == "token_type_ids":
        return torch.randint(2, shape, generator=generator)
    if example.is_floating_point():
        return torch.randn(shape, generator=generator).to(example.dtype)
    return torch.randint(vocabulary, shape, generator=generator)


def cast(batch: Mapping[str, Tensor], dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """A batch on a device; what is no integer in a type."""
    return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in batch.items()}


def torch_stage(module: nn.Module, dtype: torch.dtype | None = None) -> Stage:
    """The outputs of a module in eval mode, on the device of its parameters, as arrays of float32, float64 of a module
    in float64; inputs that are no integers are cast to the type that it computes in.

    Args:
        dtype: that it computes in; None: that of its parameters.
    """
    device, own = (getattr(next(module.parameters()), name) for name in ("device", "dtype"))
    dtype = dtype or own
    out_dtype = torch.promote_types(dtype, torch.float32)
    module = module.eval()

    @torch.no_grad()
    def run(batch: dict[str, Tensor]) -> list[np.ndarray]:
        out = module(**cast(batch, dtype, device))
        return [value.to(out_dtype).cpu().numpy() for value in pytree.tree_leaves(out) if isinstance(value, Tensor)]

    return run


def on_cuda(target: str) -> bool:
    """Whether files for a target run on a GPU here: ONNX Runtime has the provider, and PyTorch sees one."""
    return (
        target == "cuda"
        and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        and torch.cuda.is_available()
    )


def open_file(file: str | Path, target: str = "cpu", **options: str) -> onnxruntime.InferenceSession:
    """An ONNX file under ONNX Runtime: on the GPU if it is for one and there is one, else on the CPU.

    Args:
        target: `cpu` or `cuda`.
        options: of the CUDA provider; TF32 is as PyTorch has it.

    Raises:
        SubspanError: ONNX Runtime can't load it; naming the op and its module.
    """
    session = onnxruntime.SessionOptions()
    session.log_severity_level = 4
    if size_of(Path(file)) > LARGE:
        session.add_session_config_entry("session.disable_prepacking", "1")  # It copies every weight.
    session.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers: list[Any] = ["CPUExecutionProvider"]
    if on_cuda(target):
        onnxruntime.preload_dlls()
        tf32 = {"use_tf32": str(int(torch.backends.cuda.matmul.allow_tf32))}
        providers = [("CUDAExecutionProvider", tf32 | options), *providers]
    with _named(file):
        return onnxruntime.InferenceSession(str(file), session, providers=providers)


def fed(
    session: onnxruntime.InferenceSession, batch: Mapping[str, Tensor], past: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """A batch as a session reads it: the inputs that it has; those that are no integers in float32.

    Args:
        batch: by name; of a decoder with a cache `input_ids` are the new tokens, `attention_mask` is of all.
        past: keys and values of the tokens before, by name; None: zeros.
    """
    feed = {name: value.numpy() for name, value in cast(batch, torch.float32).items()} | dict(past or {})
    for value in session.get_inputs():
        if value.name == "position_ids" and value.name not in feed:
            after = feed["attention_mask"].cumsum(1) - 1
            feed[value.name] = np.clip(after, 0, None)[:, -feed["input_ids"].shape[1] :]
        elif value.name.startswith(PAST) and value.name not in feed:
            _, heads, _, width = value.shape
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            before = feed["attention_mask"].shape[1] - feed["input_ids"].shape[1]
            feed[value.name] = np.zeros((len(feed["input_ids"]), heads, before, width), dtype)
    names = {value.name for value in session.get_inputs()}
    return {name: value for name, value in feed.items() if name in names}


def outputs_of(session: onnxruntime.InferenceSession) -> list[str]:
    """Names of a file's outputs, less the keys and values."""
    return [value.name for value in session.get_outputs() if not value.name.startswith(PRESENT)]


def has_cache(session: onnxruntime.InferenceSession) -> bool:
    """Whether a file reads keys and values."""
    return any(value.name.startswith(PAST) for value in session.get_inputs())


def onnx_stage(file: str | Path, target: str = "cpu") -> Stage:
    """The outputs of an ONNX file under ONNX Runtime.

    Args:
        target: as of `open_file`.

    Raises:
        SubspanError: ONNX Runtime can't load it, or, when it is run, can't run it; naming the op and its module.
    """
    session = open_file(file, target)
    names = outputs_of(session)

    def run(batch: dict[str, Tensor]) -> list[np.ndarray]:
        with _named(file):
            return [np.asarray(value, dtype=np.float32) for value in session.run(names, fed(session, batch))]

    return run


@contextlib.contextmanager
def _named(file: str | Path) -> Iterator[None]:
    """ONNX Runtime's own error, in one line with the module that the op comes from."""
    try:
        yield
    except Exception as error:
        said = reason(error)
        node = re.search(r"[Nn]ame:\s*'([^']+)'|Node:\s*\(?([\w./]+)", said)
        name = node and (node[1] or node[2])
        scope = _scope(file, name) if name else ""
        place = f" (in {scope})" if scope else ""
        raise SubspanError(
            f"ONNX Runtime can't run the exported model{place}: {said}; nothing is written. Try another "
            "export.onnx.opset, or set export.onnx: null to ship the checkpoint alone"
        ) from error


def _scope(file: str | Path, name: str) -> str:
    """The module that a node of an ONNX file was exported from."""
    for node in onnx.load(file, load_external_data=False).graph.node:
        if node.name == name:
            for entry in node.metadata_props:
                if entry.key == "pkg.torch.onnx.name_scopes":
                    scopes = [one for one in ast.literal_eval(entry.value) if one]
                    return scopes[-2] if len(scopes) > 1 else ""
    return ""


def differences(
    reference: Stage, stages: Mapping[str, Stage], batches: Iterable[dict[str, Tensor]]
) -> dict[str, float]:
    """Largest absolute difference of any output of each stage to the reference.

    It is infinite where an output is not finite or has another shape.
    """
    worst = dict.fromkeys(stages, 0.0)
    for batch in batches:
        expected = reference(batch)
        for name, stage in stages.items():
            found = stage(batch)
            same = [x.shape for x in found] == [x.shape for x in expected]
            gaps = [gap(a, b).largest for a, b in zip(found, expected, strict=True)] if same else [np.inf]
            worst[name] = max(worst[name], *gaps)
    return worst


def apart(reference: Stage, stage: Stage, batches: Iterable[dict[str, Tensor]]) -> tuple[float, float]:
    """The largest absolute difference of any output, and the largest over its output's own size: the largest value of
    the reference, 1 at least. Infinite where an output is not finite.

    Raises:
        ValueError: one has other outputs than the other.
    """
    largest = relative = 0.0
    for batch in batches:
        for one, other in zip(stage(batch), reference(batch), strict=True):
            distance = gap(one, other).largest
            largest = max(largest, distance)
            relative = max(relative, distance / max(1.0, float(np.abs(other).max())))
    return largest, relative


class Gap(NamedTuple):
    """Absolute differences of two arrays: the largest and the row it is in, and the sum of how many there are."""

    largest: float
    row: int
    total: float
    count: int


def gap(one: np.ndarray, other: np.ndarray, mask: np.ndarray | None = None) -> Gap:
    """How far two arrays are apart; infinitely where a value is not finite. Row by row: outputs may be large.

    Args:
        one: (rows, ...), or a number.
        other: of the same shape, or one number for all.
        mask: (rows, sequence), True where a position counts; None: all count.
    """
    one = np.atleast_1d(one)
    other = np.broadcast_to(other, one.shape)
    if mask is None:
        one, other = one.reshape(len(one), -1), other.reshape(len(one), -1)
    largest, row, total, count = 0.0, 0, 0.0, 0
    for i in range(len(one)):
        some = slice(None) if mask is None else mask[i]
        with np.errstate(invalid="ignore", over="ignore"):
            found = np.abs(one[i][some].astype(np.float64) - other[i][some])
        most = float(found.max(initial=0.0))
        if not most <= largest:
            largest, row = most if np.isfinite(most) else np.inf, i
        total, count = total + float(found.sum()), count + found.size
    return Gap(largest, row, total, count)
