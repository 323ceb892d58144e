"""Folders of PEFT, written from a tuned model: what PEFT loads computes the same, or nothing is written."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..algebra import as_dense
from ..errors import SpecError, SubspanError
from ..files import aside, write_json
from ..graph.traced import TracedModel
from ..plan import Plan, Site
from ..transforms import TRANSFORMS, Peft, Place, Stored, short_name, stored_by
from ..tuned import TunedModel, adapter_tensors
from .from_peft import CONFIG, PATH, ROOT, TENSORS, modules_of_name, place_of
from .rows import attending, check_rows, turned


def save_peft(model: TunedModel, folder: str | Path, base: str | None = None, task_type: str | None = None) -> None:
    """Write the active adapter as a folder that PEFT loads, whole or not at all.

    Args:
        base: `base_model_name_or_path`.
        task_type: PEFT's name of the task, e.g. SEQ_CLS.

    Raises:
        SubspanError: PEFT has no such adapter; with the site and what it lacks.
    """
    folder = Path(folder)
    config, tensors = _written(model, task_type)
    config |= {"base_model_name_or_path": base, "task_type": task_type, "inference_mode": True}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with aside(folder) as (place,):
        place.mkdir()
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, place / TENSORS)
        write_json(place / CONFIG, config)


def parts_of(found: Plan) -> tuple[list[Site], list[Site]]:
    """The sites of a plan that are PEFT's adapter, and those that it saves whole.

    Raises:
        SubspanError: PEFT has no counterpart of a site, or not of all of them in one folder.
    """
    whole = [site for site in found.sites if len(site.chain) == 1 and (one := site.chain[0][0].peft) and one.whole]
    sites = [site for site in found.sites if not any(site is one for one in whole)]
    if not sites:
        raise SubspanError(
            "nothing but whole parameters is tuned: no adapter of PEFT's; export --adapter can write low-rank terms"
        )
    for site in sites:
        if len(site.chain) > 1:
            raise _no(site, f"PEFT has no chains ({site.transform})")
        if site.chain[0][0].peft is None:
            raise _no(site, f"PEFT has no {site.chain[0][0].name}")
        if _batched(site):
            continue
        if site.block or len(site.shape) > 2 or (site.layout and not site.place.endswith(".weight")):
            raise _no(site, "PEFT tunes whole weights of layers")
        if site.layout and not site.linear and not site.chain[0][0].peft.tables:
            raise _no(site, f"PEFT has {site.chain[0][0].name} on linear layers alone")
    kinds = sorted({site.chain[0][0].peft.kind for site in sites})
    if len(kinds) > 1:
        raise SubspanError(f"PEFT has one kind in a folder, here are {', '.join(kinds)}")
    return sites, whole


def _batched(site: Site) -> bool:
    """Whether it is a batch of weights (experts), that PEFT has as a parameter."""
    one = site.chain[0][0].peft
    return bool(site.layout and not site.block and len(site.shape) == 3 and one.batched)


def _path(site: Site, sites: list[Site], names: list[str]) -> str:
    """What the keys of its tensors begin with; of several parameters of one module PEFT nests the first inmost.

    Args:
        names: of the model's parameters, in the order that modules have them.
    """
    if not _batched(site):
        return site.place.removesuffix(".weight")
    module = site.place.rpartition(".")[0]
    beside = sorted(
        (one.place for one in sites if _batched(one) and one.place.rpartition(".")[0] == module), key=names.index
    )
    return module + ".base_layer" * (len(beside) - 1 - beside.index(site.place))


def _no(site: Site, why: str) -> SpecError:
    return SpecError(f"{site.label}: {why}", ("rules", site.rule, "apply"))


def _config(site: Site) -> dict[str, Any]:
    """The configuration of a site alone.

    Raises:
        SpecError: its options say what PEFT can't.
    """
    one, options = site.chain[0]
    try:
        own = {key: getattr(options, option) for option, key in one.peft.options.items()} | one.peft.write(options)
    except ValueError as error:
        raise _no(site, str(error)) from None
    if _batched(site) and (key := next((key for key in own if key.endswith("dropout") and own[key]), None)):
        raise _no(site, f"PEFT has no {key} on a batch of weights")
    for key, allowed in one.peft.fixed.items():
        if own.setdefault(key, allowed[0]) not in allowed:
            raise _no(site, f"{key} is {own[key]!r}; PEFT is known to compute the same with {allowed[0]!r} alone")
    return own


def _check_name(model: TracedModel, site: Site) -> None:
    """Refuse a weight that PEFT would change in one of several places, or with others whose names end alike.

    Raises:
        SpecError: with what else it is.
    """
    if len(model.tied.get(model.aliases.get(site.place, ""), [])) > 1:
        raise _no(site, "the weight is tied; PEFT changes one of the two")
    if longer := next((name for name in model.aliases if name.endswith(f".{site.place}")), None):
        raise _no(site, f"PEFT would take {longer} for it too")


_LARGEST = 16  # vLLM's rank, unless it is started with another


def check_served(model: TracedModel, found: Plan, by: str, task_type: str | None = None) -> list[str]:
    """Refuse a plan whose adapter a consumer can't read: PEFT, or what reads PEFT's folders of LoRA alone.

    Args:
        model: the traced base; no weight is read.
        by: peft, vllm, genai or olive.
        task_type: as of `save_peft`.

    Returns:
        What is good to know.

    Raises:
        SpecError: with the site and why.
    """
    sites, whole = parts_of(found)
    _check_sites(model, sites)
    check_heads(sites, heads_of(model, task_type))
    configs = {site.place.removesuffix(".weight"): _config(site) for site in sites}
    _joined(sites, configs)
    if by == "peft":
        return []
    for site in sites:
        if not site.chain[0][0].peft.factors or not site.linear or _batched(site):
            raise _no(site, f"{by} reads low-rank terms of linear layers alone; export --adapter makes such")
    if by != "vllm":
        return []
    if whole:
        raise _no(whole[0], "vLLM reads nothing that is saved whole; leave it frozen, or merge")
    largest = max(own["r"] for own in configs.values())
    return [f"vLLM has to be started with --max-lora-rank {largest}"] if largest > _LARGEST else []


def _check_sites(model: TracedModel, sites: list[Site]) -> None:
    """Refuse what PEFT computes otherwise, as far as shapes tell.

    Raises:
        SpecError: with the site and why.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    base = model.base if isinstance(model, TunedModel) else model
    check_rows(base, sites)
    for site in sites:
        peft, shape = site.chain[0][0].peft, site.shape
        _check_name(model, site)
        if any(how.shared for how in peft.tensors.values()) and shapes.setdefault("", shape) != shape:
            raise _no(site, "PEFT has one set of frozen factors; sites of other shapes have others here")
        if peft.finds:
            raise _no(site, f"PEFT finds {peft.finds} itself, and finds another than is tuned here")
        if peft.made:
            said = f"PEFT draws {', '.join(peft.made)} from a seed, and draws others than are tuned here"
            raise _no(site, f"{said}; export --adapter can write low-rank terms")
        if peft.bias and not peft.bias_parts and site.place.removesuffix("weight") + "bias" in model.aliases:
            raise _no(site, "PEFT changes the layer's bias too")


def _written(model: TunedModel, task_type: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    sites, whole = parts_of(model.plan)
    check_rows(model.base, sites)
    weights = dict(model.named_parameters(remove_duplicate=False))
    leaves, names = adapter_tensors(model), list(weights)
    configs: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[str, list[tuple[Site, Stored, Tensor, Place]]] = {}
    spoken: set[str] = set()  # biases that follow from what stands at their weights
    order = [name for name in names if any(site.place == name for site in sites)] or attending(model.base)
    for site in sites:
        peft, module = site.chain[0][0].peft, site.place.removesuffix(".weight")
        _check_name(model, site)
        values = {short_name(leaf): leaves[leaf.name].detach() for leaf in site.leaves}
        at = _place(model, site, values, weights, order)
        configs[module] = own = _config(site)
        for name, make in peft.made.items():
            if not torch.equal(make(own, at).to(values[name].device), values[name]):
                said = f"PEFT draws {name} from a seed, and draws others than are tuned here"
                raise _no(site, f"{said}; export --adapter can write low-rank terms")
        for name, stored in stored_by(peft, bool(site.layout) and not (site.linear or _batched(site))).items():
            key = f"{PATH}{_path(site, sites, names)}.{stored.name}" if not peft.rows else stored.name
            if stored.joined or (stored.pathless and stored.theirs):
                key = stored.name if peft.rows else ROOT + stored.called(module, at.number)
                shared.setdefault(key, []).append((site, stored, values.get(name), at))
            elif stored.parts:
                own = enumerate(stored.theirs(values[name], at))
                tensors |= {f"{key}.{i}": value for i, value in own}
            elif stored.theirs and name in values:
                tensors[key] = stored.theirs(values[name], at)
        if peft.beside:
            tensors |= {f"{PATH}{module}.{name}": value for name, value in peft.beside(at).items()}
        parts = _bias(model, site, peft, at, weights, leaves)
        if parts is not None:
            spoken.add(f"{module}.bias")
            tensors |= {f"{PATH}{module}.{name}": value for name, value in parts.items()}
    for key, entries in shared.items():
        try:
            joined = entries[0][1].joined
            tensors[key] = joined([(value, at) for *_, value, at in entries]) if joined else _common(entries)
        except ValueError as error:
            raise _no(entries[0][0], str(error)) from None
    peft = sites[0].chain[0][0].peft
    config = _joined(sites, configs, leaves) | {"peft_type": peft.kind}
    if not peft.rows:
        batched = {site.place for site in sites if _batched(site)}
        config["target_modules"] = sorted(configs.keys() - batched)
        config |= {"target_parameters": sorted(batched)} if batched else {}
    if any(site.layout and site.linear and not site.layout.transposed for site in sites if not _batched(site)):
        config["fan_in_fan_out"] = True
    more, said = _beside(model, sites, [site for site in whole if site.place not in spoken], leaves, task_type)
    return config | said, tensors | more


def _beside(
    model: TunedModel, sites: list[Site], whole: list[Site], leaves: Mapping[str, Tensor], task_type: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What PEFT saves beside an adapter, and what the configuration says of it: whole modules, and biases of adapted
    ones."""
    peft, weights = sites[0].chain[0][0].peft, dict(model.named_parameters(remove_duplicate=False))
    modules = {site.place.removesuffix(".weight") for site in sites}
    heads, config = heads_of(model, task_type), {}
    check_heads(sites, heads)
    own = [site for site in whole if peft.biases and site.place.removesuffix(".bias") in modules]
    if own:
        there = [module for module in modules if f"{module}.bias" in model.aliases]
        config["bias"] = peft.biases if len(own) == len(there) else "all"
    saved = _saved(model, [site for site in whole if site not in own], modules, weights, leaves, heads)
    if saved:
        config["modules_to_save"] = sorted({_head(name, heads) or name.rpartition(".")[0] for name in saved})
    root = ROOT if peft.rows else PATH
    named = {f"{PATH}{site.place.removesuffix('bias')}base_layer.bias": _whole(site, leaves) for site in own}
    return named | {root + name: value for name, value in saved.items()}, config


def _whole(site: Site, leaves: Mapping[str, Tensor]) -> Tensor:
    """A parameter that is tuned whole, as the model stores it."""
    return site.layout.restore(leaves[site.leaves[0].name].detach()).reshape(site.layout.stored)


def _place(
    model: TunedModel, site: Site, values: Mapping[str, Tensor], weights: Mapping[str, Tensor], order: list[str]
) -> Place:
    """A site as PEFT's counterparts see it; `order` are the places that are tuned, as the model has them."""
    bias = weights.get(site.place.removesuffix("weight") + "bias") if site.layout else None
    return place_of(
        site,
        values=values,
        weight=site.part(as_dense(weights[site.place].detach())) if site.layout else None,
        bias=None if bias is None else bias.detach(),
        number=order.index(site.place) if site.place in order else 0,
        turn=turned(model.base, site) if site.kind == "keys" and not site.moves else None,
    )


def _bias(
    model: TunedModel, site: Site, peft: Peft, at: Place, weights: Mapping, leaves: Mapping
) -> dict[str, Tensor] | None:
    """What says how the layer's bias is tuned, where PEFT changes it with the weight; None where it has no say.

    Raises:
        SubspanError: PEFT changes it otherwise.
    """
    name = site.place.removesuffix("weight") + "bias"
    if peft.bias is None or name not in model.aliases:
        return None
    stored = tuned = weights[name].detach()
    for other in model.plan.sites:
        if other.place == name and (there := other.chain[0][0].peft) and there.whole:
            tuned = _whole(other, leaves)
    if peft.bias_parts:
        try:
            return peft.bias_parts(stored, tuned, at)
        except ValueError as error:
            raise _no(site, str(error)) from None
    if not torch.allclose(peft.bias(stored, at), tuned, rtol=1e-6, atol=1e-7):
        raise _no(site, "PEFT changes the layer's bias too")
    return {}


def _common(entries: list[tuple[Site, Stored, Tensor, Place]]) -> Tensor:
    """The tensor that all sites share: the largest, of which theirs are parts.

    Raises:
        SubspanError: theirs are not.
    """
    _, stored, _, at = entries[0]
    held = max((stored.theirs(value, at) for _, stored, value, at in entries), key=Tensor.numel)
    if stored.size:  # What no module reads of it is not known here.
        shape = stored.size(max(at.n for *_, at in entries), max(at.m for *_, at in entries), at.options)
        part, held = held, held.new_zeros(shape)
        held[tuple(slice(size) for size in part.shape)] = part
    for site, stored, value, at in entries:
        seen = stored.ours(held, at)
        if seen.shape != value.shape or not torch.equal(seen, value):
            raise _no(site, f"PEFT has one {stored.name} for all modules; sites of this shape have another")
    return held


def _joined(
    sites: list[Site], configs: Mapping[str, dict[str, Any]], leaves: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """One configuration for all modules, with patterns where PEFT has them.

    Raises:
        SubspanError: it has none for what differs.
    """
    peft, config = sites[0].chain[0][0].peft, {}
    for key in dict.fromkeys(key for own in configs.values() for key in own):
        values = [own.get(key) for own in configs.values()]
        config[key] = Counter(map(repr, values)).most_common(1)[0][0]
        config[key] = next(value for value in values if repr(value) == config[key])
        for module, own in configs.items():
            if own.get(key) == config[key]:
                continue
            if key not in peft.patterns:
                raise SubspanError(
                    f"{module}: {key} is {own.get(key)!r} there and {config[key]!r} elsewhere; PEFT has one"
                )
            if any(map(_batched, sites)):
                raise SubspanError(f"{module}: {key} is another than elsewhere; beside batches of weights PEFT has one")
            first, _, rest = map(re.escape, module.partition("."))
            named = rf"(?<=^{first}\.){rest}" if peft.after_dot else re.escape(module)
            config.setdefault(peft.patterns[key], {})[named] = own[key]
    for site in sites:
        one, module = site.chain[0][0].peft, site.place.removesuffix(".weight")
        if one.listed:
            config.setdefault(one.listed, []).append(module)
        if one.by_module and leaves is not None:
            values = {short_name(leaf): leaves[leaf.name] for leaf in site.leaves}
            pattern, end, value = one.by_module(values, site.chain[0][1])
            config.setdefault(pattern, {})[f"{module}.{end}"] = value
    listed = {one.peft.listed for one in TRANSFORMS.values() if one.peft and one.peft.kind == peft.kind} - {None}
    return {key: [] for key in listed} | config


_HEADS = {
    "SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",),
}  # fmt: skip


def heads_of(model: TracedModel, task_type: str | None) -> list[str]:
    """The outermost modules that PEFT saves whole of itself, by the task and how their names end."""
    ends = _HEADS.get(task_type or "", ())
    found = {part for name in model.aliases for part in modules_of_name(name) if ends and part.endswith(ends)}
    return sorted(one for one in found if not any(one.startswith(f"{other}.") for other in found))


def _head(name: str, heads: Collection[str]) -> str | None:
    """The head that a parameter or a module is in."""
    return next((head for head in heads if f"{name}.".startswith(f"{head}.")), None)


def check_heads(sites: Sequence[Site], heads: Collection[str]) -> None:
    """Refuse an adapter within a head.

    Raises:
        SpecError: with the site.
    """
    for site in sites:
        if _head(site.place, heads):
            raise _no(site, "PEFT saves the head of such a task whole, and has no adapter within it: tune all of it")


def _saved(
    model: TunedModel,
    whole: list[Site],
    modules: Collection[str],
    weights: Mapping,
    leaves: Mapping,
    heads: Collection[str],
) -> dict[str, Tensor]:
    """Parameters of the modules that are saved whole, by name.

    Raises:
        SubspanError: a part of a module that PEFT adapts is tuned whole.
    """
    saved = {name: weights[model.aliases[name]].detach() for name in model.aliases if _head(name, heads)}
    for site in whole:
        module = site.place.rpartition(".")[0]
        if module in modules:
            raise _no(site, "PEFT saves whole modules beside an adapter, not a part of one that it adapts")
        _check_name(model, site)
        for name in model.aliases:
            if name.rpartition(".")[0] == module:
                saved.setdefault(name, weights[name].detach())
        saved[site.place] = _whole(site, leaves)
    return saved
