"""A base model in few bits: which of its weights, and how each is stored."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .algebra import Format, Quantised, as_dense
from .algebra.quantised import NF4
from .errors import SpecError
from .graph.traced import assign, released
from .packed import Held, check_library
from .spec import Quantise

PLACE = ("model", "quantise")


def quantise(model: nn.Module, how: Quantise, others: Collection[str] = ()) -> tuple[str, ...]:
    """Store a model's matrices in few bits, one at a time. In place; on the meta device too.

    Matrices are the weights of linear layers and of experts, by `how`, and tables that are looked up by an id, with the
    head that is tied to one or has its shape, in int8 with a scale for each row.

    Args:
        others: names of parameters that stay as they are: heads.

    Returns:
        A sentence for the weights that stay as they are: rows can't be divided into groups, or what is done with them
        is not known.

    Raises:
        SpecError: at `model.quantise`: nothing is quantised, or a library is missing.
    """
    if how.method == NF4:
        check_library((*PLACE, "method"))
    stay, done = [], 0
    for name, form in _formats(model, how, set(others)).items():
        weight = model.get_parameter(name)
        if weight.shape[-1] % form.group:
            stay.append(name)
            continue
        assign(model, {name: nn.Parameter(Quantised.of(weight, form), requires_grad=False)})
        released(weight)
        done += 1
    if not done:
        raise SpecError("there is nothing to quantise: no linear layer's rows divide into groups", PLACE)
    notes = []
    if stay:
        said = f"{len(stay)} weights are not quantised, e.g. {stay[0]}"
        notes.append(f"{said}: their rows do not divide into groups of {how.group}")
    many = [name for name, one in model.named_parameters() if one.ndim > 2 and one.shape[0] > 1]
    if left := [name for name in many if name not in stay and not isinstance(model.get_parameter(name), Quantised)]:
        said = f"{len(left)} weights of more than two dimensions are not quantised, e.g. {left[0]}"
        notes.append(f"{said}: what is done with them is not known")
    return tuple(notes)


_LEFT_OUT = "subspan"


@register_quantization_config(_LEFT_OUT)
class LeftOut(QuantizationConfigMixin):
    """For transformers: the weights that a checkpoint has in few bits are not made while the others load.

    Args:
        forms: as of `adopt`.
    """

    def __init__(self, forms: Mapping[str, Format]):
        self.quant_method, self.forms = _LEFT_OUT, forms


@register_quantizer(_LEFT_OUT)
class _Leaving(HfQuantizer):
    """Leaves nothing of weights before the checkpoint loads; they are on the meta device afterwards."""

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        self.shapes = {}
        for name in _named(model, self.quantization_config.forms).values():
            path = name.removesuffix(".weight")
            layer = model.get_submodule(path) if name.endswith(".weight") else None
            if isinstance(layer, nn.Linear | Conv1D):
                self.shapes[path] = layer.weight.shape, layer.weight.dtype
                nothing = layer.weight.new_empty(0, layer.weight.shape[1])  # Initialisers want two dimensions.
                layer.weight = nn.Parameter(nothing, requires_grad=False)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for path, (shape, dtype) in self.shapes.items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            model.get_submodule(path).weight = nn.Parameter(empty, requires_grad=False)
        self.remove_quantization_config(model)
        for module in model.modules():
            if hasattr(module, "config"):
                vars(module.config).pop("_is_quantized", None)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _named(model: nn.Module, keys: Collection[str]) -> dict[str, str]:
    """What weights of a checkpoint are called in the model; empty where it has no such weight."""
    names, base = {name for name, _ in model.named_parameters()}, f"{model.base_model_prefix}."
    every = {key: (key, f"{base}{key}", key.removeprefix(base)) for key in keys}
    return {key: next((one for one in some if one in names), "") for key, some in every.items()}


def adopt(model: nn.Module, forms: Mapping[str, Format], held: Held | None) -> set[str]:
    """Put the weights that a checkpoint has in few bits into the model. In place.

    Args:
        model: as transformers loads it with a config of dense weights.
        forms: name in the checkpoint -> how it is stored.
        held: see `packed.in_few_bits`; None: shapes alone.

    Returns:
        Their names in the model.

    Raises:
        SpecError: a weight of these is nowhere in the model, or its rows do not divide into groups.
    """
    done, named = set(), _named(model, forms)
    once, every = (dict(model.named_parameters(remove_duplicate=one)).keys() for one in (True, False))
    for key, form in forms.items():
        name = named[key]
        layer = model.get_submodule(name.rpartition(".")[0]) if name else None
        if not isinstance(layer, nn.Linear | Conv1D):
            said = "the model has no such weight" if layer is None else "it is none of a linear layer"
            said = "the config ties it to another weight" if key in every - once else said
            raise SpecError(f"{key} is stored in few bits, and {said}", ("model", "name"))
        turned = isinstance(layer, Conv1D)  # It has inputs before outputs, codes have them after.
        weight = layer.weight.t() if turned else layer.weight
        if weight.shape[1] % form.group:
            raise SpecError(f"the rows of {key} do not divide into groups of {form.group}", ("model", "name"))
        own = Quantised.of(weight, form) if held is None else held(key, weight.dtype)
        if own.shape != weight.shape:
            shapes = " and ".join(" x ".join(map(str, one.shape)) for one in (own, weight))
            raise SpecError(f"{key} does not fit the config: {shapes}", ("model", "name"))
        assign(model, {name: nn.Parameter(own.t() if turned else own, requires_grad=False)})
        done.add(name)
    return done


def _formats(model: nn.Module, how: Quantise, others: set[str]) -> dict[str, Format]:
    """Name -> how it is stored, tied weights once."""
    tables = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    if (head := _head(model)) is not None:
        tables.add(id(head))
    found = {}
    for name, weight in _matrices(model):
        if name not in others:
            table = id(weight) in tables
            found[name] = Format("int8", weight.shape[-1]) if table else Format(how.method, how.group)
    return found


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, module in model.named_modules():
        for own, weight in module.named_parameters(path, recurse=False):
            if not weight.is_floating_point():
                continue
            plain = isinstance(module, nn.Linear | Conv1D | nn.Embedding) and own.endswith("weight")
            batch = weight.ndim == 3 and weight.shape[0] > 1 and type(module).__name__.endswith("Experts")
            if plain or batch or (isinstance(module, nn.MultiheadAttention) and weight.ndim == 2):
                yield own, weight


def _head(model: nn.Module) -> nn.Parameter | None:
    """The weight that turns hidden states into scores of all tokens."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(head, "weight", None)


def forms_of(model: nn.Module) -> dict[str, tuple[Format, bool]]:
    """Name -> how it is stored, in order, and whether flipped, of a model's quantised parameters, tied ones once."""
    found = {name: one for name, one in model.named_parameters() if isinstance(one, Quantised)}
    return {name: (replace(one.form, ordered=False), one.flipped) for name, one in found.items()}


def dequantise(*models: nn.Module) -> None:
    """Make every quantised parameter of models with the same names dense; they share what is made. In place."""
    for name in forms_of(models[0]):
        made = nn.Parameter(as_dense(models[0].get_parameter(name)), requires_grad=False)
        for model in models:
            assign(model, {name: made})


def requantise(model: nn.Module, forms: Mapping[str, tuple[Format, bool]]) -> None:
    """Store parameters of a model as they were stored before: from `forms_of`. In place."""
    for name, (form, flipped) in forms.items():
        weight = model.get_parameter(name)
        made = Quantised.of(weight.t(), form).t() if flipped else Quantised.of(weight, form)
        assign(model, {name: nn.Parameter(made, requires_grad=False)})
