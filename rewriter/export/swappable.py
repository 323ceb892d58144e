"""One ONNX file, many adapters: tuned tensors are optional inputs whose defaults leave the base as it is."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from ..adapters.ties import fingerprint
from ..algebra import Dense
from ..errors import SpecError, SubspanError
from ..files import aside, digest, read_json, write_json
from ..graph.traced import TracedModel
from ..plan import Plan, Site, plan
from ..rewrite import rewrite
from ..spec import Rule, Spec
from ..transforms import Leaf, SvdFactor, initial_value
from ..tuned import TunedModel, adapter_tensors
from .onnx import export_onnx
from .ship import load_tuned, random_inputs

MODEL = "model.onnx"
_NEAR = 1e-5  # of the largest output


def ship_swappable(runs: Sequence[tuple[Spec, Path]], folder: Path, name: Callable[[Path], str]) -> dict[str, Any]:
    """Write the base once and an adapter for each run, compared with each run and with the base before they appear.

    Args:
        runs: specs and folders of runs on one base.
        folder: gets model.onnx, and for each run `<name>.onnx_adapter` with `<name>.json`: the tensors' names and
            shapes, and the base that they are for.
        name: of a run.

    Returns:
        {"adapters": {name: largest difference}, "base": largest difference}.

    Raises:
        SubspanError: runs of other bases, what stands on no activation, or a difference beyond rounding.
    """
    pretrained, _, inputs, traced, first = load_tuned(*runs[0])
    loaded = [first, *(load_tuned(*run)[4] for run in runs[1:])]
    base = fingerprint(first, first.plan.new)
    for (_, run), other in zip(runs, loaded, strict=True):
        if fingerprint(other, other.plan.new) != base:
            raise SubspanError(f"{run}: of another base than {runs[0][1]}")
        if odd := next((site for site in other.plan.sites if site.rows), None):
            raise SubspanError(
                f"{run}: {odd.label}: {odd.transform} puts rows before the sequence, which no default undoes"
            )
    found, own = _together(traced, loaded, [str(run) for _, run in runs])
    union = rewrite(traced, found).eval()
    swapped = sorted({name for names in own for name in names.values()})
    with aside(folder) as (place,):
        place.mkdir()
        file = place / MODEL
        how = (runs[0][0].export.onnx.opset, {"base": base})
        export_onnx(union, inputs, file, *how, optional={union.root + one for one in swapped})
        report: dict[str, Any] = {"adapters": {}}
        session = open_swappable(file)
        batches = list(random_inputs(runs[0][0], pretrained, inputs, first))
        if not any(model.plan.new for model in loaded):
            report["base"] = _compared(session, traced.eval(), batches, "the base")
        for (_, run), model, names in zip(runs, loaded, own, strict=True):
            one = place / f"{name(run)}.onnx_adapter"
            values = {
                union.root + names[leaf]: value for leaf, value in adapter_tensors(model).items() if leaf in names
            }
            _save(values, one)
            shapes = {leaf: list(value.shape) for leaf, value in values.items()}
            write_json(one.with_suffix(".json"), {"base": base, "adapter": digest(one), "tensors": shapes})
            report["adapters"][one.stem] = _compared(session, model.eval(), batches, str(run), one)
        write_json(place / "swappable.json", report)
    return report


def open_swappable(model: str | Path) -> ort.InferenceSession:
    """A session of the base; without ONNX Runtime's warning of every tensor that adapters set."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model, options)


def adapter_for(model: str | Path, file: str | Path) -> ort.LoraAdapter:
    """An adapter, opened for a model: `RunOptions().add_active_adapter(adapter)` makes a run use it.

    Raises:
        SubspanError: it is for another base, or not the file that its manifest was written with.
    """
    model, file = Path(model), Path(file)
    manifest = read_json(file.with_suffix(".json"))
    base = {one.key: one.value for one in onnx.load(model, load_external_data=False).metadata_props}.get("base")
    if manifest.get("base") != base:
        raise SubspanError(f"{file}: made for another base than {model}")
    if manifest.get("adapter") != digest(file):
        raise SubspanError(f"{file}: not the file that its {file.with_suffix('.json').name} was written with")
    adapter = ort.LoraAdapter()
    adapter.Load(str(file))
    return adapter


def _together(
    traced: TracedModel, models: Sequence[TunedModel], named: Sequence[str]
) -> tuple[Plan, list[dict[str, str]]]:
    """A plan with the chains of all models one after the other, equal steps once; and for each model its leaves that
    are swapped -> theirs.

    Raises:
        SubspanError: the chains can't stand together.
    """
    tied = [i for i, model in enumerate(models) if any(_bound(model, site) for site in model.plan.sites)]
    if len(tied) > 1:
        raise SubspanError(
            f"{named[tied[0]]} and {named[tied[1]]} can't stand in one graph: each has a method that starts from the "
            "frozen weight itself"
        )
    order = sorted(range(len(models)), key=lambda i: i not in tied)
    chains: dict[tuple[str, Any, str], list[Any]] = {}
    for model in (models[i] for i in order):
        for site in model.plan.sites:
            steps = chains.setdefault((site.place, site.block, site.kind), [])
            steps += [step for step in site.chain if step not in steps]
    try:
        found = plan(traced, _rules(chains), models[0].plan.new)
    except SpecError as error:
        raise SubspanError(f"{', '.join(named)} can't stand in one graph: {error.message}") from None
    sites = {(site.place, site.block, site.kind): site for site in found.sites}
    own = []
    for model in models:
        names = {}
        for site in model.plan.sites:
            there = sites[site.place, site.block, site.kind]
            for leaf in site.leaves:
                if leaf.role != "constant" or leaf.name in model.given:
                    names[leaf.name] = _renamed(site, there, leaf.name)
        own.append(names)
    return found, own


@torch.no_grad()
def _bound(model: TunedModel, site: Site) -> bool:
    """Whether a chain, as it starts on the frozen weight, changes another weight: then it has to stand first."""
    if site.layout is None or site.replaces:
        return False
    if any(isinstance(leaf.initial, SvdFactor) for leaf in site.leaves):
        return True
    w = site.part(model.get_parameter(site.place).detach())
    made: dict[str, Tensor] = {}

    def lookup(leaf: Leaf) -> Tensor:
        if leaf.name not in made:
            held = adapter_tensors(model)[leaf.name].detach()
            made[leaf.name] = held if leaf.role == "chosen" else initial_value(leaf, 0, dict).to(w).reshape(leaf.shape)
        return made[leaf.name]

    site.compose(Dense(w), lookup)
    other = w + w.std() * torch.randn(w.shape, generator=torch.Generator().manual_seed(0)).to(w)
    return not torch.allclose(site.compose(Dense(other), lookup).dense(), other, rtol=1e-3, atol=1e-3 * float(w.std()))


def _rules(chains: Mapping[tuple, Sequence[tuple[Any, Any]]]) -> list[Rule]:
    rules = []
    for (place, block, _), steps in chains.items():
        part = {} if block is None else {"slice": list(block)}
        apply = [{one.name: options.model_dump()} for one, options in steps]
        rules.append(Rule(target=place, apply=apply, **part))
    return rules


def _renamed(site: Any, there: Any, leaf: str) -> str:
    """A leaf's name in a chain where its step may be the second of its name."""
    if not leaf.startswith(f"{site.name}."):
        return leaf
    for i, step in enumerate(site.chain):
        own = sum(other.name == step[0].name for other, _ in site.chain[: i + 1])
        head = f"{site.name}.{step[0].name}" + (f"_{own}" if own > 1 else "")
        if leaf.startswith(f"{head}."):
            at = there.chain.index(step)
            uses = sum(other.name == step[0].name for other, _ in there.chain[: at + 1])
            return f"{site.name}.{step[0].name}" + (f"_{uses}" if uses > 1 else "") + leaf.removeprefix(head)
    return leaf


def _save(values: Mapping[str, Tensor], file: Path) -> None:
    made = ort.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in values.items()}
    made.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in arrays.items()})
    made.export_adapter(str(file))


def _compared(
    session: ort.InferenceSession,
    model: TracedModel,
    batches: Sequence[Mapping[str, Tensor]],
    what: str,
    file: Path | None = None,
) -> float:
    """The largest difference of the session's outputs, with an adapter, from a model's.

    Raises:
        SubspanError: it is more than rounding.
    """
    options, largest = ort.RunOptions(), 0.0
    adapter = ort.LoraAdapter()
    if file is not None:
        adapter.Load(str(file))
        options.add_active_adapter(adapter)
    for batch in batches:
        found = session.run(None, {name: value.numpy() for name, value in batch.items()}, options)
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(model(**batch))
        for a, b in zip(found, (one.numpy() for one in expected if isinstance(one, Tensor)), strict=True):
            gap = float(np.abs(a - b).max())
            if not gap <= _NEAR * max(1.0, float(np.abs(b).max())):
                raise SubspanError(
                    f"{what} differs by {gap:.2e} from what it is in one graph with others; nothing is written"
                )
            largest = max(largest, gap)
    return largest
