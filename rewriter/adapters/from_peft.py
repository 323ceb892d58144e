"""Folders of PEFT, read: rules and values of a traced model.

What a folder tunes is told by its tensors, not by `target_modules`; each transform says beside its expression how its
tensors are stored (`transforms.peft`). Checked against PEFT 0.21.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ..errors import SpecError, SubspanError, reason
from ..files import load_tensors, read_json
from ..graph.sublayers import embeddings, paths
from ..graph.traced import TracedModel
from ..plan import Site, plan
from ..rewrite import rewrite
from ..spec import Rule
from ..transforms import TRANSFORMS, Leaf, Peft, Place, Transform, entire, short_name, stored_by
from ..tuned import TunedModel
from .rows import attending, moved, turned

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ROOT, PATH = "base_model.", "base_model.model."
# transformers' class -> `task_type`.
TASK_TYPES = {
    "AutoModelForSequenceClassification": "SEQ_CLS", "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS", "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM", "AutoModel": "FEATURE_EXTRACTION",
}  # fmt: skip
# Of every kind: what the folder is, and what its tensors say themselves.
_COMMON = {
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_weights", "layers_pattern", "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "revision",
    "save_projection", "target_modules", "task_type",
}  # fmt: skip


# What a view of tensors of other shapes, or a key of another type, raises.
_ODD = (RuntimeError, IndexError, TypeError, AttributeError, KeyError, ZeroDivisionError)


class _Config(dict):
    """A configuration whose missing keys are said: what they would be depends on PEFT's version."""

    def __missing__(self, key: str) -> Any:
        raise SubspanError(f"{key} is missing")


@dataclass(frozen=True)
class Found:
    """A module of a folder.

    Attributes:
        module: its path in the base model.
        transform: with `options`, as a rule has them.
        config: with what patterns say of this module.
        tensors: leaf -> as it is stored; several where it is stored in parts.
        shared: the folder's tensors without a path.
        further: other tensors of the module.
        table: it is an embedding.
    """

    module: str
    transform: Transform
    options: dict[str, Any]
    config: Mapping[str, Any]
    tensors: dict[str, Tensor | tuple[Tensor, ...]]
    shared: dict[str, Tensor]
    further: dict[str, Tensor]
    table: bool

    @property
    def peft(self) -> Peft:
        return self.transform.peft

    def place(self, site: Site, weight: Tensor | None, **more: Any) -> Place:
        """Where its tensors are; `more` as of `Place`."""
        own = {stored_by(self.peft, self.table)[leaf].name: value for leaf, value in self.tensors.items()}
        further = {name: _wide(value, weight) for name, value in (own | self.further).items()}
        return place_of(site, weight=weight, further=further, **more)

    def value(self, leaf: Leaf, at: Place) -> Tensor | None:
        """A leaf's value, or None where the folder has none.

        Raises:
            SubspanError: it is of another shape, or of another base.
        """
        name = short_name(leaf)
        stored = stored_by(self.peft, self.table).get(name)
        place = self.shared.get(stored.called(self.module, at.number)) if stored and stored.pathless else None
        held = place if place is not None else self.tensors.get(name)
        try:
            if name in self.peft.made:
                return self.peft.made[name](self.config, at)
            if held is None:
                return None
            value = stored.ours(held, at)
        except ValueError as error:
            raise SubspanError(f"{self.module}: {error}".removeprefix(": ")) from None
        except _ODD as error:
            said = f"{self.module}: {stored.name if stored else name} does not fit: {reason(error)}"
            raise SubspanError(said.removeprefix(": ")) from None
        if tuple(value.shape) != leaf.shape:
            shape = " and ".join(str(tuple(one.shape)) for one in (held if stored.parts else (held,)))
            own = ", ".join(f"{key} {self.config[key]}" for key in self.peft.options.values())
            weight = f"a weight of {at.n} inputs and {at.m} outputs{own and f' with {own}'}"
            said = f"{self.module}: {stored.name} of shape {shape} does not fit {weight}"
            raise SubspanError(said.removeprefix(": "))
        return value.clone()  # What is shared may be a view of it.


def _wide(value: Any, weight: Tensor | None) -> Any:
    """In a weight's type, if it is a tensor of numbers."""
    known = isinstance(value, Tensor) and value.is_floating_point() and weight is not None
    return value.to(weight.dtype) if known else value


def place_of(site: Site, **more: Any) -> Place:
    """A site as PEFT's counterparts see it; `more` as of `Place`."""
    batch = site.shape[0] if len(site.shape) == 3 else None
    return Place(*site.shape[-2:], site.chain[0][1], batch=batch, kind=site.kind, **more)


def is_peft(folder: Path) -> bool:
    """Whether a folder is PEFT's."""
    return (folder / CONFIG).is_file()


def modules_of(folder: Path) -> tuple[list[Found], dict[str, Tensor], list[str]]:
    """What a folder tunes: its modules, whole parameters by name, and what is good to know.

    Raises:
        SubspanError: it is no folder of PEFT's, or says what no transform can.
    """
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type")
    known = [one for one in TRANSFORMS.values() if one.peft and kind in (one.peft.kind, *one.peft.read_as)]
    if not known or not kind:
        raise SubspanError(f"{folder / CONFIG}: peft_type {kind!r}: no transform computes that")
    if config.get("save_projection") is False:
        raise SubspanError(f"{folder / CONFIG}: save_projection: False: the frozen tensors are not in the folder")
    if not (folder / TENSORS).is_file():
        raise SubspanError(f"{folder / TENSORS} is missing: tensors are read from safetensors alone")
    modules, whole, shared = _sorted(load_tensors(folder / TENSORS), known)
    if not modules:
        raise SubspanError(f"{folder / TENSORS}: no tensor of {kind}")
    try:
        empty = [module for module, parts in modules.items() if not any(map(_size, parts.values()))]
        modules = {module: parts for module, parts in modules.items() if module not in empty}
        found = [_found(module, parts, config, known, shared) for module, parts in sorted(modules.items())]
        notes = sorted({note for one in found for note in _checked(one, config)})
    except SubspanError as error:
        raise SubspanError(f"{folder / CONFIG}: {error}") from None
    return found, whole, notes


def _size(held: Tensor | tuple[Tensor, ...]) -> int:
    return sum(map(Tensor.numel, held)) if isinstance(held, tuple) else held.numel()


def _sorted(
    tensors: Mapping[str, Tensor], known: Collection[Transform]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of modules, of whole parameters, and those without a path."""
    every = [one.peft for one in known]
    names = {stored.name for one in every for table in (one.tensors, one.tables) for stored in table.values()}
    names |= {name for one in every for name in one.further}
    each = [stored for one in every for stored in one.tensors.values()]
    shared_names = {stored.name for stored in each if stored.shared}
    ended = {stored.name for stored in each if stored.ending} | {name for one in every for name in one.further}
    parts = {stored.name for stored in each if stored.parts}
    modules: dict[str, dict[str, Any]] = {}
    whole, shared = {}, {}
    for key in sorted(tensors, key=lambda key: re.sub(r"\d+", lambda digits: digits[0].zfill(9), key)):
        value, path = tensors[key], key.removeprefix(PATH) if key.startswith(PATH) else key.removeprefix(ROOT)
        before, _, last = path.rpartition(".")
        if last.isdigit() and any(before.endswith(f".{one}") for one in parts):
            path = before
        name = max((one for one in names if path == one or path.endswith(f".{one}")), key=len, default=None)
        if before in ended:
            shared[path] = value
        elif name in parts:
            held = modules.setdefault(path.removesuffix(name).removesuffix("."), {})
            held[name] = (*held.get(name, ()), value)
        elif name is None and ".original_module." in path:
            continue  # As it was before: what is trained stands beside it.
        elif name is None:
            whole[re.sub(r"\.modules_to_save\.(default\.)?|\.base_layer\.", ".", path)] = value
        elif path == name and name in shared_names:
            shared[name] = value
        elif name not in shared_names:  # PEFT writes what is shared once more with every module.
            modules.setdefault(path.removesuffix(name).removesuffix("."), {})[name] = value
    return modules, whole, shared


def _found(
    module: str,
    parts: Mapping[str, Tensor],
    config: Mapping[str, Any],
    known: Collection[Transform],
    shared: dict[str, Tensor],
) -> Found:
    for one in known:
        for table in (False, True):
            stored = {name: leaf for leaf, name in _names(one.peft, table).items()}
            tensors = {stored[name]: value for name, value in parts.items() if name in stored}
            further = {name: value for name, value in parts.items() if name in one.peft.further}
            needed = {leaf for leaf, how in stored_by(one.peft, table).items() if how.needed and not how.pathless}
            whole = bool(tensors) and needed <= tensors.keys() and len(tensors) + len(further) == len(parts)
            if not whole or not one.peft.fits(config, tensors):
                continue
            own = _of_module(one.peft, config, module)
            given = {option: own[key] for option, key in one.peft.options.items()}
            if null := next((key for option, key in one.peft.options.items() if given[option] is None), None):
                raise SubspanError(f"{null}: null is no value")
            try:
                given |= one.peft.read(own, tensors)
                one.options.model_validate(given)
            except ValidationError as error:
                wrong = error.errors()[0]
                key = one.peft.options.get(str(wrong["loc"][0]), wrong["loc"][0])
                raise SubspanError(f"{key}: {wrong['msg']}") from None
            except ValueError as error:
                raise SubspanError(str(error)) from None
            except _ODD as error:
                raise SubspanError(f"{module}: its tensors do not fit the configuration: {reason(error)}") from None
            return Found(module, one, given, own, tensors, shared, further, table)
    for key in known[0].peft.fixed if len(known) == 1 else ():
        if key in config:
            _check_fixed(known[0], key, config[key])
    raise SubspanError(f"{module}: {', '.join(sorted(parts))} are no whole set of tensors of {config['peft_type']}")


def _names(peft: Peft, table: bool) -> dict[str, str]:
    return {leaf: how.name for leaf, how in stored_by(peft, table).items() if not how.pathless}


def _of_module(peft: Peft, config: Mapping[str, Any], module: str) -> dict[str, Any]:
    """The configuration with what its patterns say of a module, in the way PEFT matches them."""
    own = _Config(config)
    for key, pattern in peft.patterns.items():
        held = config.get(pattern) or {}
        if not isinstance(held, Mapping):
            raise SubspanError(f"{pattern}: {held!r} is no mapping")
        for expression, value in held.items():
            try:
                hit = re.match(rf"(.*\.)?({expression})$", module)
            except re.error as error:
                raise SubspanError(f"{pattern}: {expression!r}: {error}") from None
            if hit:
                own[key] = value
                break
    return own


def _checked(found: Found, config: Mapping[str, Any]) -> Iterator[str]:
    """Refuse keys that change what is computed in a way that no transform has; what counts in training alone is noted.

    Raises:
        SubspanError: naming the key.
    """
    peft = found.peft
    said = _COMMON - peft.fixed.keys() | set(peft.options.values()) | peft.ignored | set(peft.patterns.values())
    said |= {peft.listed}
    if peft.batched and config.get("target_parameters"):
        if patterns := [key for key in peft.patterns.values() if config.get(key)]:
            raise SubspanError(f"{patterns[0]} with target_parameters is not read")
        said.add("target_parameters")
    for key, value in config.items():
        if key in peft.fixed:
            _check_fixed(found.transform, key, value)
        elif key in said or not value:
            continue
        elif key.endswith("dropout"):
            yield f"{CONFIG}: {key}: {value} counts in training alone and is not taken over"
        else:
            raise SubspanError(f"{key}: {value!r} is nothing that {found.transform.name} can say")


def _check_fixed(one: Transform, key: str, value: Any) -> None:
    """Refuse another value than those with which PEFT computes the same.

    Raises:
        SubspanError: naming the key.
    """
    if value not in one.peft.fixed[key]:
        allowed = " or ".join(map(repr, one.peft.fixed[key]))
        raise SubspanError(f"{key}: {value!r} is nothing that {one.name} can say, {allowed} is")


def tuned_from(
    model: TracedModel,
    folder: Path,
    new: tuple[str, ...] = (),
    without: Collection[str] = (),
    also: Collection[str] = (),
) -> tuple[TunedModel, list[str]]:
    """A traced model rewritten as a folder of PEFT has it, with its values; and what is good to know.

    Args:
        new: names of newly made parameters.
        without, also: as of `rewrite`.

    Raises:
        SubspanError: as `modules_of`; or the folder is of another model.
    """
    found, whole, notes = modules_of(folder)
    try:
        return _tuned(model, found, whole, new, without, also), notes
    except SpecError as error:
        raise SubspanError(f"{folder}: {error.message}") from None
    except SubspanError as error:
        raise SubspanError(f"{folder}: {error}") from None


def _tuned(
    model: TracedModel,
    found: list[Found],
    whole: dict[str, Tensor],
    new: tuple[str, ...],
    without: Collection[str],
    also: Collection[str],
) -> TunedModel:
    whole_one = entire()
    at = {place: one for one in found for place in _targets(model, one)}
    weights = dict(model.named_parameters(remove_duplicate=False))
    biases = [f"{one.module}.bias" for one in found if one.peft.bias and f"{one.module}.bias" in model.aliases]
    for name in [name for name in whole if model.aliases.get(name) in at]:  # PEFT saves embeddings that it adapts.
        if not torch.equal(whole.pop(name).double(), weights[model.aliases[name]].detach().double()):
            raise SubspanError(f"{name} is another than the model's, and is adapted")
    for name in whole:
        _check_tied(model, name, whole, weights)
    if unknown := [name for name in whole if name not in model.aliases]:
        raise SubspanError(f"{unknown[0]} is nothing that the model has")
    _check_saved(model, found[0].config, whole)
    if both := sorted(whole.keys() & biases):
        raise SubspanError(f"{both[0]} is there beside what is tuned of it")
    groups: dict[str, tuple[dict, list[str]]] = {}
    rows = next((one for one in found if one.peft.moves), None)
    takes = rows is not None and moved(model, len(next(iter(rows.tensors.values()))))
    for place, one in at.items():
        options = one.options | ({one.peft.moves: True} if takes else {})
        step = {one.transform.name: options} if options else one.transform.name
        groups.setdefault(repr(step), (step, []))[1].append(place)
    rules = [Rule(target=sorted(places), apply=[step]) for step, places in groups.values()]
    if more := sorted([*whole, *biases]):
        rules.append(Rule(target=more, apply=[whole_one.name]))
    given = {
        f"{place}.{one.transform.name}": one.peft.sizes(one.tensors) for place, one in at.items() if one.peft.sizes
    }
    planned = plan(model, rules, new, given=given)
    values: dict[str, Tensor] = {}
    order = [place for place in weights if place in at] or list(at)
    for site in planned.sites:
        if site.place in at and site.chain[0][0] is not whole_one:
            turn = turned(model, site) if site.kind == "keys" and not site.moves else None
            place = {"number": order.index(site.place), "count": len(order), "turn": turn}
            _take(at[site.place], site, weights, values, **place)
    for site in planned.sites:
        if site.chain[0][0] is whole_one:
            names = model.tied.get(site.place, [site.place])
            value = next((whole[name] for name in names if name in whole), None)
            if value is None:
                value = values[site.place]
            if tuple(value.shape) != site.layout.stored:
                raise SubspanError(
                    f"{site.place} is of shape {tuple(value.shape)}, the model's of {site.layout.stored}: is it of "
                    "another base, or are its labels others (--set model.labels=[...])?"
                )
            values[site.leaves[0].name] = site.layout.present(value).dense()
    return rewrite(model, planned, values=values, without=without, also=also)


def _check_saved(model: TracedModel, config: Mapping[str, Any], whole: Mapping[str, Tensor]) -> None:
    """Refuse a folder that lacks a module which it says that it saves.

    Raises:
        SubspanError: naming it.
    """
    for entry in config.get("modules_to_save") or ():
        modules = {part for name in model.aliases for part in modules_of_name(name) if f".{part}".endswith(f".{entry}")}
        if modules and not any(name.startswith(f"{module}.") for module in modules for name in whole):
            raise SubspanError(f"modules_to_save: {entry} is not in the folder")


def modules_of_name(name: str) -> list[str]:
    """The modules that a parameter is in."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _check_tied(model: TracedModel, name: str, whole: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse a weight that PEFT saves apart from the one that it is tied to.

    Raises:
        SubspanError: the folder has not the same of both.
    """
    place = model.aliases.get(name, "")
    for other in model.tied.get(place, []):
        value = whole.get(other, weights[place].detach())
        if other != name and not torch.equal(whole[name].double(), value.double()):
            raise SubspanError(f"modules_to_save: {name} is tied to {other}; PEFT trains a copy of one")


def _targets(model: TracedModel, one: Found) -> list[str]:
    """What a rule says of a module: its weight, or what its rows precede."""
    if not one.peft.rows:
        return [_target(model, one)]
    if "embeddings" in one.transform.on:
        return [_before_embeddings(model)]
    if not (modules := attending(model)):
        raise SubspanError("no attention of the model is known, before whose keys and values rows could stand")
    return modules


def _target(model: TracedModel, one: Found) -> str:
    name = f"{one.module}.weight"
    if name not in model.aliases:
        name = _parameter(model, one) or name
    if name not in model.aliases:
        raise SubspanError(f"{name} is nothing that the model has")
    if len(same := model.tied.get(model.aliases[name], [])) > 1:
        raise SubspanError(
            f"{one.module}: its weight is tied to {next(x for x in same if x != name)}; PEFT changes one"
        )
    return model.aliases[name]


def _parameter(model: TracedModel, one: Found) -> str | None:
    """The batch of weights, among `target_parameters`, that a module's tensors fit; of several of one module PEFT nests
    them, and shapes tell which is which.

    Raises:
        SubspanError: they do not.
    """
    listed, module = one.config.get("target_parameters") or (), one.module.replace(".base_layer", "")
    ends = {name.rpartition(".")[2] for name in listed}
    names = [name for end in sorted(ends) if (name := f"{module}.{end}") in model.aliases]
    names = [name for name in names if any(f".{name}".endswith(f".{target}") for target in listed)]
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    fitting = [name for name, shape in shapes.items() if len(shape) == 3 and one.peft.batched(one.tensors, shape)]
    if len(fitting) > 1 or (names and not fitting):
        raise SubspanError(f"{one.module}: its tensors fit {' and '.join(fitting) or 'none'} of {', '.join(names)}")
    return fitting[0] if fitting else None


def _before_embeddings(model: TracedModel) -> str:
    found = embeddings(next(iter(model.graphs.values())))
    if len(found) != 1:
        raise SubspanError(f"{len(found)} tables of token embeddings are read; PEFT's rows stand before one")
    return paths(found[0])[-1]


def _take(one: Found, site: Site, weights: Mapping[str, Tensor], values: dict[str, Tensor], **more: Any) -> None:
    """The values of a site's leaves, and of its module's bias by the bias's name; `more` as of `Place`."""
    own: dict[str, Tensor] = {}
    weight = site.part(weights[site.place].detach()) if site.layout else None
    stored = weights.get(f"{one.module}.bias")
    at = one.place(site, weight, values=own, bias=None if stored is None else stored.detach(), **more)
    for leaf in site.leaves:
        value = one.value(leaf, at)
        if value is not None:
            values[leaf.name], own[short_name(leaf)] = value, _wide(value, weight)
        elif leaf.role == "tuned" or any(
            how.pathless and key == short_name(leaf) for key, how in one.peft.tensors.items()
        ):
            raise SubspanError(f"{one.module}: the folder lacks {one.peft.tensors[short_name(leaf)].name}")
    if one.peft.bias is None:
        return
    before = torch.zeros(site.shape[-1], dtype=weight.dtype) if stored is None else stored.detach()
    after = one.peft.bias(before, at)
    if stored is not None:
        values[f"{one.module}.bias"] = after
    elif after.any():
        raise SubspanError(f"{one.module}: PEFT adds a bias, and the module has none")
