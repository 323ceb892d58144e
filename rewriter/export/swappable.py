"""One ONNX file, many adapters: tuned tensors are optional inputs whose defaults leave the base as it is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from ..adapters.ties import fingerprint
from ..algebra import Dense, as_dense
from ..errors import SpecError, SubspanError
from ..files import aside, digest, read_json, write_json
from ..graph.traced import Inputs, TracedModel
from ..passes.base import PREFIX
from ..plan import Site, plan
from ..pretrained import Pretrained, save_processor
from ..quantise import dequantise
from ..rewrite import rewrite
from ..spec import Onnx, Rule, Spec
from ..transforms import Leaf, SvdFactor, Transform, initial_value, named
from ..tuned import TunedModel, adapter_tensors
from .decoder import decoder_of, decoding_stage, genai_config
from .onnx import export_onnx
from .ship import load_tuned, longest_of, random_inputs
from .verify import Stage, apart, torch_stage

MODEL = "model.onnx"
_NEAR = 1e-5  # of the largest output


def ship_swappable(runs: Mapping[str, tuple[Spec, Path]], folder: Path) -> dict[str, Any]:
    """Write the base once and an adapter for each run, compared with each run and with the base before they appear.

    Args:
        runs: name -> spec and folder of runs on one base, the first one's options of export are taken.
        folder: gets model.onnx, and for each run `<name>.onnx_adapter` with `<name>.json`: the tensors' names and
            shapes, and the base that they are for. A decoder has its cache, and what onnxruntime-genai reads beside it.

    Returns:
        {"adapters": {name: largest difference}, "base": largest difference, "cache": whether it has one, of a decoder}.

    Raises:
        SubspanError: runs of other bases, what stands on no activation, or a difference beyond rounding.
    """
    (spec, run), *_ = runs.values()
    pretrained, processor, inputs, traced, first = load_tuned(spec, run)
    models = {name: load_tuned(*one)[4] if one[1] != run else first for name, one in runs.items()}
    base = fingerprint(first, first.plan.new)
    for name, model in models.items():
        if fingerprint(model, model.plan.new) != base:
            raise SubspanError(f"{runs[name][1]}: of another base than {run}")
        if odd := next((site for site in model.plan.sites if site.rows), None):
            raise SubspanError(f"{name}: {odd.label}: no default undoes rows that are put before the sequence")
    dequantise(traced, *models.values(), *([pretrained.model] if pretrained.model is pretrained.module else []))
    union, own = _together(traced, models)
    swapped = {there for names in own.values() for there in names.values()}
    with aside(folder) as (place,):
        place.mkdir()
        file = place / MODEL
        decoder = _decoder(spec, pretrained, inputs, union)
        graph, examples, called = decoder or (union, inputs, {})
        opset = (spec.export.onnx or Onnx()).opset
        export_onnx(graph, examples, file, opset, {"base": base}, called=called, optional=swapped)
        session, report = open_swappable(file), {"adapters": {}}
        if spec.task.decodes:
            report["cache"] = decoder is not None
        save_processor(processor, place, spec.task)
        if decoder:
            config = genai_config(file, pretrained.model.config, processor, longest_of(pretrained, union))
            write_json(place / "genai_config.json", config)
        batches = list(random_inputs(spec, pretrained, inputs, first))
        if not any(model.plan.new for model in models.values()):
            report["base"] = _compared(session, decoder is not None, traced, batches, "the base")
        for name, model in models.items():
            one, held = place / f"{name}.onnx_adapter", adapter_tensors(model)
            values = {there: held[leaf] for leaf, there in own[name].items()}
            _save(values, one)
            shapes = {leaf: list(value.shape) for leaf, value in values.items()}
            write_json(one.with_suffix(".json"), {"base": base, "adapter": digest(one), "tensors": shapes})
            report["adapters"][name] = _compared(session, decoder is not None, model, batches, name, one)
        write_json(place / "swappable.json", report)
    return report


def open_swappable(model: str | Path) -> ort.InferenceSession:
    """A session of the base; without ONNX Runtime's warning of every tensor that adapters set."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model, options)


def adapter_for(model: str | Path, file: str | Path) -> ort.LoraAdapter:
    """An adapter, opened for a model: `RunOptions().add_active_adapter(adapter)` makes a run use it. It has to be kept
    for as long as these options are: they do not hold it.

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


Key = tuple[str, Any, str]  # a site's place, block and kind


def _together(traced: TracedModel, models: Mapping[str, TunedModel]) -> tuple[TunedModel, dict[str, dict[str, str]]]:
    """The base with the chains of all models one after the other, equal steps once; and for each model its leaves that
    are swapped -> what they are called there.

    Raises:
        SubspanError: the chains can't stand together.
    """
    tied = [name for name, model in models.items() if any(_bound(model, site) for site in model.plan.sites)]
    if len(tied) > 1:
        raise SubspanError(
            f"{tied[0]} and {tied[1]} can't stand in one graph: each has a method that starts from the frozen weight"
        )
    chains: dict[Key, list[Any]] = {}
    for name in sorted(models, key=lambda name: name not in tied):
        for site in models[name].plan.sites:
            steps = chains.setdefault(_key(site), [])
            for step in site.chain:
                steps += [step] * (site.chain.count(step) - steps.count(step))
    own, sizes, values = {}, {}, {}
    for name, model in models.items():
        own[name], held = {}, adapter_tensors(model)
        for site in model.plan.sites:
            heads = _heads(site.chain, site.name)
            there = _heads(chains[_key(site)], site.name)
            for use, head in heads.items():
                given = site.given.get(head, {})
                if sizes.setdefault(there[use], given) != given:
                    raise SubspanError(f"{name}: {site.label}: a schedule left other sizes there in another run")
            for leaf in site.leaves:
                if leaf.role == "constant" and leaf.name not in model.given:
                    continue
                head, short = leaf.name.rpartition(".")[::2]
                use = next((use for use, one in heads.items() if one == head), None)
                called = leaf.name if use is None else f"{there[use]}.{short}"
                own[name][leaf.name] = PREFIX + called
                if leaf.role != "tuned":
                    values[called] = held[leaf.name]
    try:
        found = plan(traced, _rules(chains), next(iter(models.values())).plan.new, given=sizes)
        return rewrite(traced, found, values=values).eval(), own
    except SpecError as error:
        raise SubspanError(f"{', '.join(models)} can't stand in one graph: {error.message}") from None


def _key(site: Site) -> Key:
    return site.place, site.block, site.kind


def _heads(chain: Sequence[tuple[Transform, Any]], site: str) -> dict[tuple[Any, int], str]:
    """(step, which of its equals) -> what its leaves begin with, in the order of the chain."""
    found: dict[tuple[Any, int], str] = {}
    for name, one, options in named(chain, site):
        step = (one, options)
        found[step, sum(other == step for other, _ in found)] = name
    return found


@torch.no_grad()
def _bound(model: TunedModel, site: Site) -> bool:
    """Whether a chain, as it starts on the frozen weight, changes another weight: then it has to stand first."""
    if site.layout is None:
        return False
    if any(leaf.role == "constant" and leaf.name.startswith(f"{site.name}.") for leaf in site.leaves):
        return True
    if site.replaces:
        return False
    w = site.part(as_dense(model.get_parameter(site.place).detach()))
    made: dict[str, Tensor] = {}

    def lookup(leaf: Leaf) -> Tensor:
        if leaf.name not in made:
            held = adapter_tensors(model)[leaf.name].detach()
            known = leaf.role == "chosen" or isinstance(leaf.initial, SvdFactor)
            made[leaf.name] = held if known else initial_value(leaf, 0, dict).to(w).reshape(leaf.shape)
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


def _decoder(
    spec: Spec, pretrained: Pretrained, inputs: Inputs, union: TunedModel
) -> tuple[nn.Module, Inputs, dict[str, str]] | None:
    """The union with a cache, as `decoder_of`; None where there is none."""
    if not spec.task.decodes or union.plan.new:
        return None
    if hasattr(pretrained.model, "set_experts_implementation"):
        pretrained.model.set_experts_implementation("batched_mm")  # As `for_onnx`.
    try:
        return decoder_of(pretrained.model, inputs, union, merged=False)
    except SubspanError:
        return None


def _save(values: Mapping[str, Tensor], file: Path) -> None:
    made = ort.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in values.items()}
    made.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in arrays.items()})
    made.export_adapter(str(file))


def _compared(
    session: ort.InferenceSession,
    cache: bool,
    model: TracedModel,
    batches: Sequence[dict[str, Tensor]],
    what: str,
    file: Path | None = None,
) -> float:
    """The largest difference of the session's outputs, with an adapter, from a model's.

    Args:
        cache: the session's graph has one.

    Raises:
        SubspanError: it is more than rounding.
    """
    options, adapter = ort.RunOptions(), ort.LoraAdapter()
    if file is not None:
        adapter.Load(str(file))
        options.add_active_adapter(adapter)

    def whole(batch: dict[str, Tensor]) -> list[np.ndarray]:
        return session.run(None, {name: value.numpy() for name, value in batch.items()}, options)

    def real(stage: Stage) -> Stage:  # A row's padding is at other positions with a cache than without.
        return lambda batch: [value * batch["attention_mask"].unsqueeze(-1).numpy() for value in stage(batch)]

    stages = torch_stage(model), decoding_stage(session, options) if cache else whole
    largest, relative = apart(*(map(real, stages) if cache else stages), batches)
    if not relative <= _NEAR:
        raise SubspanError(f"{what} differs by {largest:.2e} in one graph with others; nothing is written")
    return largest
