"""Encoder-decoders with a cache: the encoder's file gives the keys and values of cross-attention, the decoder's reads
them beside its own of the tokens before, and returns its own with those of the new tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from ..errors import SubspanError
from ..graph.traced import Inputs
from .decoder import cache_name, cache_of, kept, layered, probed, reading
from .verify import PAST, PRESENT, Stage

FILES = ("encoder_model.onnx", "decoder_model.onnx")
_SIZES = {"batch": 3, "encoder_sequence": 5, "sequence": 4, "past_sequence": 7}
_Part = tuple[nn.Module, Inputs, dict[str, str]]


def parts_of(model: nn.Module, inputs: Inputs) -> tuple[_Part, _Part] | None:
    """Encoder and decoder of a model, each with examples of what it reads and what its inputs and outputs are called.

    The encoder takes `input_ids` and `attention_mask`, (batch, encoder_sequence); it gives `last_hidden_state` and the
    keys and values of cross-attention of each decoder layer in turn, (batch, heads, encoder_sequence, width). The
    decoder takes `input_ids` (batch, sequence) of the new tokens, `encoder_attention_mask`, and keys and values of both
    kinds; it gives `logits` of the new tokens, and keys and values of all of its own.

    Args:
        model: of transformers, in eval mode; its forward takes and returns an `EncoderDecoderCache`.
        inputs: of the model without a cache.

    Returns:
        None where the model keeps no keys and values of both kinds, or reads more than tokens and their mask.

    Raises:
        SubspanError: it takes no such cache.
    """
    if set(inputs.kwargs) != {"input_ids", "attention_mask", "decoder_input_ids"}:
        return None
    plain, name = type(model).forward, cache_name(model)
    short = {key: value[:1, :2] for key, value in inputs.kwargs.items()}
    out = probed(model, short, EncoderDecoderCache(DynamicCache(), DynamicCache()))
    cache = getattr(out, name, None)
    before, cross = (kept(getattr(cache, f"{kind}_attention_cache", None)) for kind in ("self", "cross"))
    if not before or not cross:
        return None
    hidden = out.encoder_last_hidden_state

    def encode(self: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        own = {name: EncoderDecoderCache(DynamicCache(), DynamicCache()), "use_cache": True}
        first = torch.zeros_like(input_ids[:, :1])
        out = plain(self, input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=first, **own)
        return {"last_hidden_state": out.encoder_last_hidden_state, "present": kept(out[name].cross_attention_cache)}

    def decode(
        self: nn.Module, input_ids: Tensor, encoder_attention_mask: Tensor, past: list[Tensor], cross: list[Tensor]
    ) -> dict[str, Any]:
        cache = EncoderDecoderCache(cache_of(past), cache_of(cross))
        cache.is_updated = dict.fromkeys(cache.is_updated, True)
        # Of what was encoded only its size is read.
        encoded = encoder_attention_mask[:, :, None].to(hidden.dtype).expand(-1, -1, hidden.shape[-1])
        own = {name: cache, "use_cache": True, "encoder_outputs": (encoded,)}
        out = plain(self, decoder_input_ids=input_ids, attention_mask=encoder_attention_mask, **own)
        return {"logits": out.logits, "present": kept(out[name].self_attention_cache)}

    encoder, decoder = _examples(before, cross)
    given = _named("present", layered(PRESENT, len(cross), ".encoder"))
    held = _named("past", layered(PAST, len(before), ".decoder")) | _named(
        "cross", layered(PAST, len(cross), ".encoder")
    )
    held |= _named("present", layered(PRESENT, len(before), ".decoder"))
    return (reading(model, encode).eval(), encoder, given), (reading(model, decode).eval(), decoder, held)


def _examples(before: Sequence[Tensor], cross: Sequence[Tensor]) -> tuple[Inputs, Inputs]:
    """Of what encoder and decoder read, as `parts_of` says.

    Args:
        before, cross: keys and values of self- and of cross-attention of each layer in turn, of any sizes.
    """
    batch, encoded, sequence, past = _SIZES.values()
    ones = lambda *shape: torch.ones(shape, dtype=torch.long, device=cross[0].device)  # noqa: E731
    like = lambda held, size: [value.new_zeros(batch, value.shape[1], size, value.shape[3]) for value in held]  # noqa: E731
    text = {name: ones(batch, encoded) for name in ("input_ids", "attention_mask")}
    new = {"input_ids": ones(batch, sequence), "encoder_attention_mask": text["attention_mask"]}
    along = {0: "batch", 1: "encoder_sequence"}
    dynamic = {
        "input_ids": {0: "batch", 1: "sequence"},
        "encoder_attention_mask": along,
        "past": {0: "batch", 2: "past_sequence"},
        "cross": {0: "batch", 2: "encoder_sequence"},
    }
    read = new | {"past": like(before, past), "cross": like(cross, encoded)}
    return Inputs((), text, dict.fromkeys(text, along)), Inputs((), read, dynamic)


def _named(which: str, names: Sequence[str]) -> dict[str, str]:
    return {f"{which}_{i}": name for i, name in enumerate(names)}


def encoded(session: Any, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The last hidden state of texts, and what `decoded` reads of them.

    Args:
        session: of the encoder's file.
        ids, mask: (batch, encoder_sequence).
    """
    names = [value.name for value in session.get_outputs()]
    hidden, *cross = session.run(None, {"input_ids": ids, "attention_mask": mask})
    held = {name.replace(PRESENT, PAST): value for name, value in zip(names[1:], cross, strict=True)}
    return hidden, held | {"encoder_attention_mask": mask}


def decoded(
    session: Any, ids: np.ndarray, held: dict[str, np.ndarray], past: dict[str, np.ndarray] | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits of the new tokens, and keys and values for the next ones.

    Args:
        session: of the decoder's file.
        ids: (batch, sequence) the new tokens.
        held: from `encoded`.
        past: from the call before.
    """
    if past is None:
        own = [value for value in session.get_inputs() if value.name.startswith(PAST) and ".decoder." in value.name]
        past = {one.name: np.zeros((len(ids), one.shape[1], 0, one.shape[3]), np.float32) for one in own}
    names = [value.name for value in session.get_outputs()]
    logits, *present = session.run(None, {"input_ids": ids, **held, **past})
    return logits, {name.replace(PRESENT, PAST): value for name, value in zip(names[1:], present, strict=True)}


def decoding_stage(encoder: Any, decoder: Any, outputs: Sequence[str]) -> Stage:
    """Outputs of whole rows: the first half of the label's tokens, and then one by one.

    Args:
        encoder, decoder: sessions.
        outputs: names of the tuned model's.

    Raises:
        SubspanError: one that neither file gives.
    """
    if unknown := set(outputs) - {"logits", "encoder_last_hidden_state"}:
        raise SubspanError(f"an output that is neither the encoder's nor the decoder's: {', '.join(sorted(unknown))}")

    def run(batch: dict[str, Tensor]) -> list[np.ndarray]:
        given = {name: value.numpy() for name, value in batch.items()}
        hidden, held = encoded(encoder, given["input_ids"], given["attention_mask"])
        ids, past, parts = given["decoder_input_ids"], None, []
        half = (ids.shape[1] + 1) // 2
        for start, stop in [(0, half), *((i, i + 1) for i in range(half, ids.shape[1]))]:
            logits, past = decoded(decoder, ids[:, start:stop], held, past)
            parts.append(logits)
        found = {"logits": np.concatenate(parts, axis=1), "encoder_last_hidden_state": hidden}
        return [found[name] for name in outputs]

    return run
