"""Choose: every variant is compared with the tuned run and timed, and the fastest that holds is what is shipped."""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SubspanError
from ..graph.traced import TracedModel
from . import compare
from .decoder import stepping
from .kernels import fallen, lacking
from .latency import Run, bound, forward, interleaved, products
from .onnx import files_of, placed, size_of
from .variants import PLAIN, VARIANTS, attention_nodes, build
from .verify import cast, on_cuda, onnx_stage, open_file

SHIPPED = "model.onnx"
_SAID = 300  # characters
_KEYS = (
    "name", "file", "bytes", "holds", "reason", "metric", "agreement", "max_abs_diff", "mean_abs_diff",
    "fused_attention", "latency_ms",
)  # fmt: skip


def offer(
    truth: compare.Truth, names: Sequence[str], plain: Path, attentions: int | None, target: str
) -> list[dict[str, Any]]:
    """Build the variants and compare each with the tuned run; one that fails does not stop the others.

    Args:
        names: of the variants.
        plain: the float32 file.
        attentions: how many there are in the traced graph; None: some of no form that is known.
        target: what the files are for.

    Returns:
        An entry of export.json for each, and for the float32 one, which ships then, where none holds: its name, file,
        bytes, whether it holds and why not, metric, agreement, largest and mean difference from the tuned model, and
        how many attentions are one node.
    """
    offered = []
    for name in names:
        entry = dict.fromkeys(_KEYS) | {"name": name, "holds": False, "latency_ms": {}}
        try:
            file = build(name, plain)
            entry |= {"file": str(file), "bytes": size_of(file)}
            entry["fused_attention"] = attention_nodes(file)
            entry |= _judged(truth, name, file, target)
            fuses, apart = VARIANTS[name].fuses, (attentions or 0) - entry["fused_attention"]
            if fuses and attentions is None:
                entry["reason"] = "its attention has no form that is known, so whether each is one node is not known"
            elif fuses and apart > 0:
                entry["reason"] = f"{apart} of {attentions} attentions are not one node: no rule of onnxscript matches"
            entry["holds"] = entry["reason"] is None
        except SubspanError as error:
            said = str(error).split("; nothing is written")[0].replace(f"{plain.parent}/", "")
            entry["reason"] = said if len(said) < _SAID else f"{said[:_SAID]} ..."
        offered.append(entry)
    if not any(entry["holds"] for entry in offered) and PLAIN not in names:
        offered += offer(truth, [PLAIN], plain, attentions, target)
    return offered


def _judged(truth: compare.Truth, name: str, file: Path, target: str) -> dict[str, Any]:
    """How a file does beside the tuned run, and why it does not hold, if so."""
    variant, stage, spec = VARIANTS[name], onnx_stage(file, target), truth.spec
    exact = variant.change is None
    tally = truth.tally([name])
    found, scale = truth.distances({name: stage}, tally, wide=exact)
    one = found[name]
    metrics, share = truth.measured({name: stage}, tally).get(name, ({}, None))
    value, why, decided = metrics.get(spec.compared), None, share is not None
    own = truth.rows.metrics[spec.compared] if truth.rows else None
    if variant.mixes and truth.rows and truth.rows.most > truth.rows.size:
        other = truth.batched(truth.rows.most)
        metrics, least = other.measured({name: stage}, other.tally([name]))[name]
        value = max(value, metrics[spec.compared], key=lambda found: abs(found - own))
        share = min(share, least) if decided else None
    share = one.same / one.tokens if one.tokens else share
    if exact:
        why = truth.far(name, found, scale)
    elif truth.rows is None:
        why = f"nothing says what it costs: {truth.why}"
    if why is None and share is not None and share < variant.agreement and (decided or not exact):
        why = f"{share:.2%} of its decisions are the tuned run's; {variant.agreement:.1%} at least"
    if why is None and not decided and not exact:
        far = abs(value - own) > variant.change * max(abs(own), 1e-3)
        why = (
            f"{spec.compared} {value:.4f}, the tuned run's {own:.4f}: over {variant.change:.0%} apart" if far else None
        )
    if why is None and target == "cuda" and (left := off_the_gpu(file)):
        why = f"leaves the GPU for {', '.join(left)}"
    mean = one.total / one.count if one.count else 0.0
    return {"metric": value, "agreement": share, "max_abs_diff": one.tuned, "mean_abs_diff": mean, "reason": why}


def beside_checkpoint(onnx: Path, merged: Path) -> None:
    """Put what ships under `onnx/` of a checkpoint: the folder that hubs have, and that their consumers open."""
    (merged / "onnx").mkdir()
    for file in sorted(onnx.glob("*.onnx")):
        placed(file, merged / "onnx" / file.name)


def off_the_gpu(file: Path) -> list[str]:
    """Operators of a file that compute on the CPU: as the provider says where there is a GPU, else by its table."""
    return fallen(file, open_file(file, "cuda")) if on_cuda("cuda") else lacking(file)


def timed(
    offered: Sequence[dict[str, Any]], module: nn.Module, batches: Mapping[str, Mapping[str, Tensor]], target: str
) -> dict[str, dict[str, float]]:
    """Time what holds in turn with the module itself; each entry gets its `latency_ms`, in place.

    Args:
        offered: from `offer`.
        module: what the files were made of; it is moved to the target.
        batches: what they are called -> inputs; where the mask is of more tokens than there are ids, it is a step of a
            decoder with a cache.
        target: of the files.

    Returns:
        Milliseconds of the module (`eager`), of it under `torch.compile` where that works (`compile`), and of its
        matrix products alone (`products`), by batch; on a GPU in each type that a file computes in (`eager-float16`).
    """
    held = [entry for entry in offered if entry["holds"]] if batches else []
    device = "cuda" if on_cuda(target) else "cpu"
    module.eval().to(device)
    types = {VARIANTS[entry["name"]].dtype for entry in held} - {torch.float32} if device == "cuda" else set()
    modules = {"": module} | {f"-{str(one)[6:]}": copy.deepcopy(module).to(one) for one in types}
    beside: dict[str, dict[str, float]] = {
        f"{run}{name}": {} for name in modules for run in ("eager", "compile", "products")
    }
    places = beside | {entry["name"]: entry["latency_ms"] for entry in offered}
    sessions = {entry["name"]: _opened(entry["file"], target) for entry in held}
    for i, (shape, batch) in enumerate(batches.items()):
        steps = "input_ids" in batch and batch["attention_mask"].shape != batch["input_ids"].shape
        runs = {name: bound(one, batch, -1 if steps else i + 1) for name, one in sessions.items()}
        for name, one in modules.items():
            runs |= {f"{what}{name}": run for what, run in _beside(one, batch, device, steps).items()}
        for name, found in interleaved(runs).items():
            places[name][shape] = round(found, 3)
    return beside


def _beside(module: nn.Module, batch: Mapping[str, Tensor], device: str, steps: bool) -> dict[str, Run]:
    """The runs of a module on a batch."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    given = cast(batch, dtype, device)
    if steps:  # A traced model has no cache to take a step with.
        return {} if isinstance(module, TracedModel) else {"eager": stepping(module, given)}
    runs = {"eager": forward(module, given), "products": products(module, given)}
    # One CUDA graph, like the files.
    compiled = torch.compile(module, mode="reduce-overhead" if device == "cuda" else "default", dynamic=False)
    with contextlib.suppress(Exception):  # Of any of its back ends, and of compilers that are not there.
        with torch._dynamo.config.patch(recompile_limit=64):
            (run := forward(compiled, given))()
        runs["compile"] = run
    return runs


def _opened(file: str, target: str) -> Any:
    """A file as one CUDA graph where it can be one; on the CPU simply opened."""
    with contextlib.suppress(SubspanError):
        return open_file(file, target, enable_cuda_graph="1")
    return open_file(file, target)


def settle(offered: Sequence[dict[str, Any]], plain: Path) -> str:
    """Put the fastest file that holds in the place of `model.onnx`, and remove those that do not hold. In place.

    Fastest is what is least behind the best at any shape; where nothing was timed, the first that holds. Where nothing
    holds it is the float32 file.

    Args:
        offered: from `offer`; files are named within their folder afterwards.
        plain: the float32 file.

    Returns:
        The name of the chosen one.
    """
    held = [entry for entry in offered if entry["holds"]]
    best = {
        shape: min(entry["latency_ms"][shape] for entry in held) for shape in (held[0]["latency_ms"] if held else ())
    }
    behind = lambda entry: max((entry["latency_ms"][shape] / least for shape, least in best.items()), default=1.0)  # noqa: E731
    chosen = min(held, key=behind)["name"] if held else PLAIN
    file = next((Path(entry["file"]) for entry in held if entry["name"] == chosen), plain)
    placed(file, plain.with_name(SHIPPED))
    kept = {file, *(Path(entry["file"]) for entry in held)}
    for made in {plain, *(Path(entry["file"]) for entry in offered if entry["file"])} - kept:
        for one in files_of(made):
            one.unlink()
    for entry in offered:
        entry["file"] = Path(entry["file"]).name if entry["holds"] or entry["name"] == chosen else None
    return chosen
