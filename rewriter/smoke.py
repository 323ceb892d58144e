"""A small copy of a spec's model and of its run: the same config with few layers and random weights, for two steps.

Everything that a real run passes through is passed: real rows, every pass, merge, export, comparison.
"""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from .graph.globs import expand_braces
from .pretrained import Pretrained, quiet
from .resources import is_local
from .spec import Data, Spec
from .spec.data import Part

LAYERS, STEPS, ROWS = 2, 2, 16
_COUNTS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "num_encoder_layers",
)  # fmt: skip
# What lists a value for each layer.
_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "attention_layers", "mlp_only_layers")
_BESIDE = ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json", "sentence_bert_config.json")


def small_model(spec: Spec, shapes: Pretrained, processor: Any, location: str, folder: Path) -> None:
    """Write a base model of few layers and random weights into a folder, with the spec's own tokenizer.

    Args:
        shapes: the model on the meta device: its config, what is new in it, its type.
        processor: of the model.
        location: of the model; small files that say how it is used are copied.
    """
    config = type(shapes.model.config).from_dict(shapes.model.config.to_dict())
    for part in {id(part): part for part in (config, config.get_text_config(), *_parts(config))}.values():
        _shorten(part, _least(spec))
    torch.manual_seed(spec.train.seed)
    with quiet():
        auto = getattr(transformers, spec.task.auto)
        model = auto.from_config(config, trust_remote_code=spec.model.trust_remote_code).to(shapes.model.dtype)
        kept = {name: value for name, value in model.state_dict().items() if name not in shapes.new}
        model.save_pretrained(folder, state_dict=kept)
        processor.save_pretrained(folder)
    for name in _BESIDE:
        if is_local(location) and os.path.isfile(os.path.join(location, name)):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(os.path.join(location, name), folder / name)


def _parts(config: Any) -> list[Any]:
    names = getattr(config, "sub_configs", {})
    return [part for name in names if (part := getattr(config, name, None)) is not None]


def _least(spec: Spec) -> int:
    """Two layers, or as many as the rules name by number."""
    parts = (p for rule in spec.rules for one in rule.targets for text in expand_braces(one) for p in text.split("."))
    return max([LAYERS, *(int(part) + 1 for part in parts if part.isdigit())])


def _shorten(config: Any, layers: int) -> None:
    """Fewer layers, in place; a pattern over layers is kept from its start."""
    for name in _COUNTS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), layers))
    for name in _LISTS:
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[:layers])


def _unweighted(data: Data) -> list[Part] | None:
    """The parts of a mixture without their weights: of few rows a share may be none."""
    return data.mixture and [part.model_copy(update={"weight": None}) for part in data.mixture]


def small_spec(spec: Spec, folder: Path) -> Spec:
    """The spec on the model in a folder, for two steps on few rows; what only a full run can tell is left out."""
    data, train = spec.data, spec.train
    rows = STEPS * train.batch_size * train.gradient_accumulation
    limit = data.limit.model_copy(
        update={
            "train": min(rows, data.limit.train or rows),
            "validation": min(ROWS, data.limit.validation or ROWS),
        }
    )
    halves = train.precision == "float16" and not torch.cuda.is_available()
    short = {
        "max_steps": STEPS,
        "log_steps": 1,
        "checkpoint_steps": STEPS,
        "evaluate_steps": None,
        "patience": None,
        "track": [],
        "generate": spec.writing and spec.writing.model_copy(update={"rows": 2, "tokens": 4, "steps": None}),
        "class_weights": None if train.class_weights == "balanced" else train.class_weights,
        "precision": "float32" if halves else train.precision,
    }
    model = spec.model.model_copy(update=dict.fromkeys(("gguf", "revision", "config", "dtype")) | {"name": str(folder)})
    small = spec.model_copy(
        update={
            "model": model,
            "data": data.model_copy(update={"limit": limit, "mixture": _unweighted(data)}),
            "train": train.model_copy(update=short),
            "limits": type(spec.limits)(),
            "strict": False,
        }
    )
    small._locate = spec._locate
    return small


@contextlib.contextmanager
def hidden(place: Path) -> Iterator[None]:
    """Nothing is said, and decompositions are kept in a folder that goes."""
    before = os.environ.get("SUBSPAN_CACHE")
    os.environ["SUBSPAN_CACHE"] = str(place / "cache")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.environ.pop("SUBSPAN_CACHE") if before is None else os.environ.update(SUBSPAN_CACHE=before)
