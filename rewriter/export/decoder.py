"""Decoders with a cache: one graph that reads the keys and values of the tokens before, and returns them with its own.

Prefill is a call with keys and values of length 0, decoding one with a token at a time.
"""

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import onnx_ir
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..errors import SubspanError, reason
from ..graph.traced import Inputs
from ..trace import trace, twin
from ..tuned import TunedModel
from .latency import Run, waited
from .merge import rest, staying
from .verify import PAST, PRESENT, Stage, fed

_BEFORE = {"embeddings"}  # Kinds of sites that become keys and values.
_SIZES = {"batch": 3, "sequence": 4, "past_sequence": 7, "total_sequence": 11}


def decoder_of(
    model: nn.Module, inputs: Inputs, tuned: TunedModel | None = None, merged: bool = True
) -> tuple[nn.Module, Inputs, dict[str, str]] | None:
    """A causal language model with its cache, examples of what it reads, and what inputs and outputs are called.

    Its forward takes `input_ids` (batch, sequence) of the new tokens, `attention_mask` (batch, past + sequence),
    `position_ids` (batch, sequence) and `past`, keys and values of each layer in turn, (batch, heads, past, width); it
    gives `logits` of the new tokens and `present`, keys and values of all.

    Args:
        model: of transformers, in eval mode; its forward takes and returns a `DynamicCache`.
        inputs: of the model without a cache.
        tuned: whose sites that can't merge are to stand in the graph; what it puts before the tokens becomes keys and
            values that are there before the first token.
        merged: whether what can merge is in the model's weights; if not, all sites are to stand in the graph.

    Returns:
        None where the model keeps no keys and values, or reads more than tokens and their mask.

    Raises:
        SubspanError: it takes no such cache, or can't be traced.
    """
    if set(inputs.kwargs) != {"input_ids", "attention_mask"}:
        return None
    short = {name: value[:1, :2] for name, value in inputs.kwargs.items()}
    held = kept(getattr(probed(model, short, DynamicCache()), cache_name(model), None))
    if not held:
        return None
    batch, sequence, past, total = _SIZES.values()
    first = inputs.kwargs["input_ids"]
    kwargs = {
        "input_ids": first.new_zeros(batch, sequence),
        "attention_mask": first.new_ones(batch, total),
        "position_ids": torch.arange(past, total, device=first.device).repeat(batch, 1),
        "past": [value.new_zeros(batch, value.shape[1], past, value.shape[3]) for value in held],
    }
    tokens = {0: "batch", 1: "sequence"}
    dynamic = {"input_ids": tokens, "attention_mask": {0: "batch", 1: "total_sequence"}, "position_ids": tokens}
    dynamic["past"] = {0: "batch", 2: "past_sequence"}
    called = {f"past_{i}": name for i, name in enumerate(layered(PAST, len(held)))}
    called |= {f"present_{i}": name for i, name in enumerate(layered(PRESENT, len(held)))}
    examples = Inputs((), kwargs, dynamic)
    decoder = _decoder(model, _before(model, inputs, tuned, merged) if tuned is not None and tuned.rows else [])
    if tuned is not None and staying(tuned, _BEFORE, merged):
        decoder = rest(tuned, trace(decoder, examples, ("eval",)), _BEFORE, merged)
    return decoder.eval(), examples, called


def _decoder(model: nn.Module, before: Sequence[Tensor]) -> nn.Module:
    """The model under its parameters' own names, with another forward.

    Args:
        before: (1, heads, rows, width) keys and values that every sequence has first.
    """
    plain = type(model).forward
    counts = "position_ids" in inspect.signature(plain).parameters
    rows = before[0].shape[2] if before else 0

    def forward(
        self: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> dict[str, Any]:
        if rows:
            own = [self.get_buffer(f"before_{i}").expand(input_ids.shape[0], -1, -1, -1) for i in range(len(past))]
            past = [torch.cat(pair, dim=2) for pair in zip(own, past, strict=True)]
            attention_mask = torch.cat([attention_mask.new_ones((input_ids.shape[0], rows)), attention_mask], dim=1)
        more = {cache_name(self): cache_of(past)} | ({"position_ids": position_ids + rows} if counts else {})
        out = plain(self, input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **more)
        return {"logits": out.logits, "present": [value[:, :, rows:] for value in kept(out[cache_name(self)])]}

    other = reading(model, forward)
    for i, value in enumerate(before):
        other.register_buffer(f"before_{i}", value)
    return other


def _before(model: nn.Module, inputs: Inputs, tuned: TunedModel, merged: bool) -> list[Tensor]:
    """(1, heads, rows, width) keys and values of what a tuned model puts before the tokens, of each layer in turn."""
    plain = type(model).forward

    def forward(self: nn.Module, input_ids: Tensor) -> dict[str, Any]:
        out = plain(self, input_ids=input_ids, use_cache=True, **{cache_name(self): DynamicCache()})
        return {"logits": out.logits, "present": kept(out[cache_name(self)])}

    alone = Inputs((), {"input_ids": inputs.kwargs["input_ids"][:1]}, {"input_ids": {1: "sequence"}})
    whole = rest(tuned, trace(reading(model, forward), alone, ("eval",)), merged=merged)
    with torch.no_grad():
        out = whole(**alone.kwargs)
    return [value[:, :, : tuned.rows].clone() for value in out["present"]]


def reading(model: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """The model again, over the same tensors, with another forward.

    Raises:
        SubspanError: it can't be copied.
    """
    other = twin(model)
    if other is model:
        raise SubspanError(f"{type(model).__name__} can't be copied, so its forward can't be changed")
    other.forward = MethodType(forward, other)
    return other


def cache_name(model: nn.Module) -> str:
    """What a model of transformers calls its cache, as an argument and in its output; of an older release in another
    way."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def probed(model: nn.Module, batch: Mapping[str, Tensor], cache: Any) -> Any:
    """What a model gives for a batch and an empty cache.

    Raises:
        SubspanError: it takes no such cache.
    """
    try:
        with torch.no_grad():
            return model(**batch, use_cache=True, **{cache_name(model): cache})
    except Exception as error:  # Of any model.
        raise SubspanError(f"the model takes no cache of keys and values alone: {reason(error)}") from error


def cache_of(held: Sequence[Tensor]) -> DynamicCache:
    """A cache of keys and values of each layer in turn."""
    return DynamicCache(list(zip(held[::2], held[1::2], strict=True)))


def kept(cache: Any) -> list[Tensor]:
    """(batch, heads, sequence, width) keys and values of each layer of a cache in turn; none where it keeps others."""
    found = [getattr(layer, name, None) for layer in getattr(cache, "layers", []) for name in ("keys", "values")]
    return found if all(isinstance(value, Tensor) and value.ndim == 4 for value in found) else []


def layered(which: str, count: int, part: str = "") -> list[str]:
    """Names of so many keys and values of each layer in turn.

    Args:
        which: `PAST` or `PRESENT`.
        part: of an encoder-decoder: `.decoder` or `.encoder`.
    """
    return [f"{which}.{i // 2}{part}.{('key', 'value')[i % 2]}" for i in range(count)]


def genai_config(file: Path, config: Any, processor: Any, longest: int | None) -> dict[str, Any]:
    """What onnxruntime-genai reads beside a decoder with a cache, whatever the architecture.

    Args:
        file: the ONNX file, by the name that it ships under.
        config: of the model; its tokens are read.
        processor: the tokenizer.
        longest: sequence that the model takes; None: any.
    """
    graph = onnx_ir.load(file).graph
    shapes = {value.name: value.shape for value in (*graph.inputs, *graph.outputs)}
    layers = sum(name.startswith(PAST) and name.endswith(".key") for name in shapes)
    _, heads, _, width = shapes[f"{PAST}.0.key"]
    text, most = config.get_text_config(), longest or 2**20
    ends = config.eos_token_id if config.eos_token_id is not None else processor.eos_token_id
    decoder = {
        "filename": file.name,
        "head_size": width,
        "hidden_size": text.hidden_size,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers,
        "session_options": {"provider_options": []},
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in shapes}
        | {"past_key_names": f"{PAST}.%d.key", "past_value_names": f"{PAST}.%d.value"},
        "outputs": {
            "logits": "logits",
            "present_key_names": f"{PRESENT}.%d.key",
            "present_value_names": f"{PRESENT}.%d.value",
        },
    }
    size = shapes["logits"][-1]
    known = lambda token: token if isinstance(token, int) and token < size else None  # noqa: E731
    model = {
        "type": "decoder",
        "vocab_size": size,
        "context_length": most,
        "bos_token_id": known(config.bos_token_id if config.bos_token_id is not None else processor.bos_token_id),
        "eos_token_id": [one for one in ends if known(one) is not None] if isinstance(ends, list) else known(ends),
        "pad_token_id": known(processor.pad_token_id),
        "decoder": decoder,
    }
    search = {"max_length": most, "do_sample": False, "past_present_share_buffer": False}
    return {"model": {name: value for name, value in model.items() if value is not None}, "search": search}


def step(
    session: Any, batch: Mapping[str, Tensor], past: Mapping[str, np.ndarray] | None = None, options: Any = None
) -> tuple[Any, dict]:
    """Logits of the new tokens, and keys and values for the next ones; `options` are ONNX Runtime's of a run."""
    names = [value.name for value in session.get_outputs()]
    found = dict(zip(names, session.run(None, fed(session, batch, past), options), strict=True))
    return found["logits"], {name.replace(PRESENT, PAST): value for name, value in found.items() if name != "logits"}


def stepping(model: nn.Module, batch: Mapping[str, Tensor]) -> Run:
    """A run of a model of transformers on the next token of each row, with its own cache of those before.

    Args:
        batch: `input_ids` (rows, 1), and `attention_mask` of all tokens.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache, before = DynamicCache(), mask.shape[1] - ids.shape[1]
    with torch.inference_mode():
        own = {cache_name(model): cache, "use_cache": True}
        model(input_ids=ids.expand(-1, before), attention_mask=mask[:, :before], **own)

    @torch.inference_mode()
    def run() -> None:
        model(**batch, **own)
        cache.crop(-1)
        waited(batch)

    return run


def decoding_stage(session: Any, options: Any = None) -> Stage:
    """Logits of whole rows, in four calls: the first half, two tokens one by one, and what is left; `options` as of
    `step`."""

    def run(batch: dict[str, Tensor]) -> list[np.ndarray]:
        length, past, parts = batch["input_ids"].shape[1], None, []
        half = (length + 1) // 2
        cuts = sorted({0, half, min(half + 1, length), min(half + 2, length), length})
        for start, stop in itertools.pairwise(cuts):
            some = {"input_ids": batch["input_ids"][:, start:stop], "attention_mask": batch["attention_mask"][:, :stop]}
            logits, past = step(session, some, past, options)
            parts.append(logits)
        return [np.concatenate(parts, axis=1)]

    return run
