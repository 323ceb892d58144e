"""Latency: the same batch through several runs in turn, and the least that a model's matrix products take."""

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import SpecError
from ..graph.ops import aten
from .verify import fed

SHAPES = ((1, 32), (8, 128))
SECONDS = 3.0
_AGAIN, _PAUSE = 3, 0.05  # Seconds; at 0.01 a small step of PyTorch still takes 50 times as long.
_ROUNDS = (3, 25)
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default)

Run = Callable[[], Any]


def shapes_of(given: Sequence[Sequence[int]] | None, longest: int | None, sequences: bool) -> list[tuple[int, int]]:
    """Batch sizes and lengths to time; without sequences the batch sizes alone, with length 1.

    Args:
        given: of the spec; None: `SHAPES`, as far as the model takes them.
        longest: sequence that the model takes.

    Raises:
        SpecError: a length that is given is longer.
    """
    made = []
    for i, (batch, length) in enumerate(SHAPES if given is None else given):
        if sequences and longest is not None and length > longest and given is not None:
            raise SpecError(f"the model takes at most {longest} tokens", ("export", "latency", i))
        made.append((batch, min(length, longest or length) if sequences else 1))
    return list(dict.fromkeys(made))


def interleaved(runs: Mapping[str, Run]) -> dict[str, float]:
    """Median milliseconds of each run, all of them in turn on the same machine.

    Each has its turn several times in a row after a pause, and the first does not count: threads of the run before may
    still spin, and those of PyTorch wait for a core then.

    All of it takes about `SECONDS`; where one turn of all takes longer, each has one that counts.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for run in runs.values():
        run()
    once = time.perf_counter() - started
    least, most = _ROUNDS if once < SECONDS else (1, 1)
    again = _AGAIN if once < SECONDS else 1
    for _ in range(max(least, min(most, int(SECONDS / (once * (again + 1) + _PAUSE * len(runs)))))):
        for name, run in runs.items():
            time.sleep(_PAUSE)
            run()
            for _ in range(again):
                begun = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - begun)
    return {name: 1000 * statistics.median(found) for name, found in times.items()}


def machine() -> dict[str, Any]:
    """Where times are taken: the processor, PyTorch's threads, how many tasks ran or waited in the last minute, and the
    GPU if there is one."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    found = {"processor": named[1] if named else platform.machine(), "threads": torch.get_num_threads()}
    found["load"] = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def forward(module: nn.Module, batch: Mapping[str, Tensor]) -> Run:
    """A run of a module on a batch that is on its device; it waits for the GPU."""

    @torch.inference_mode()
    def run() -> None:
        module(**batch)
        waited(batch)

    return run


def bound(session: Any, batch: Mapping[str, Tensor], graph: int) -> Run:
    """A run of an opened file on a batch. On a GPU, inputs and outputs lie there, and where the session can it is one
    CUDA graph, captured at the first runs.

    Args:
        graph: number of the graph within the session, for each batch another; -1: none, for shapes that do not stay.
    """
    feed = fed(session, batch)
    if session.get_providers()[0] != "CUDAExecutionProvider":
        return partial(session.run, None, feed)
    uncaptured, options = onnxruntime.RunOptions(), onnxruntime.RunOptions()
    uncaptured.add_run_config_entry("gpu_graph_id", "-1")
    options.add_run_config_entry("gpu_graph_id", str(graph))
    binding = session.io_binding()
    for name, value in feed.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value, "cuda", 0))
    for value in session.get_outputs():
        binding.bind_output(value.name, "cuda")
    session.run_with_iobinding(binding, uncaptured)
    for value, made in zip(session.get_outputs(), binding.get_outputs(), strict=True):
        binding.bind_ortvalue_output(value.name, made)

    def run() -> None:
        session.run_with_iobinding(binding, options)
        binding.synchronize_outputs()

    return run


def waited(batch: Mapping[str, Tensor]) -> None:
    """Come back when the GPU of a batch, if it is on one, has done everything."""
    if any(value.is_cuda for value in batch.values()):
        torch.cuda.synchronize()


class _Products(TorchDispatchMode):
    """Keeps every matrix product that runs under it, as a function that does it again."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Run] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _PRODUCTS or "scaled_dot_product" in str(func):
            self.found.append(partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def products(module: nn.Module, batch: Mapping[str, Tensor]) -> Run:
    """A run of the matrix products of a module on a batch and of nothing else, as PyTorch computes them.

    Args:
        module: in eval mode, with its inputs on the same device.
    """
    with _Products() as mode:
        module(**batch)

    @torch.no_grad()
    def run() -> None:
        for one in mode.found:
            one()
        waited(batch)

    return run
