"""What writes: a model, or an ONNX file, that goes on rows of tokens, with a cache where it can have one."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import SubspanError
from ..graph.traced import Inputs, assign
from ..greedy import Following, Ids, Opening, Said, again, cached, either, greedy, right
from ..passes.fuse.defer_head import last_alone
from ..pretrained import Pretrained, ends_of, set_ends
from ..spec import Spec
from ..trace import twin
from ..tuned import TunedModel, adapter_tensors
from .decoder import decoder_of, step
from .encoder_decoder import decoded, encoded
from .ship import longest_of

_DECODER = "decoder_input_ids"


def rereading(forward: Callable[[dict[str, Tensor]], Any], names: Sequence[str], start: int | None) -> Opening:
    """By whole rows each time.

    Args:
        forward: a batch by name -> an output with logits (rows, sequence, vocabulary).
        names: of what it reads.
        start: the token that an encoder-decoder's text starts with.
    """

    def opening(rows: Ids) -> tuple[Following, Ids]:
        if _DECODER not in names:
            run = lambda ids, mask: forward({"input_ids": ids, "attention_mask": mask}).logits  # noqa: E731
            return again(run), rows
        ids, mask = right(rows)
        read = {name: value for name, value in (("input_ids", ids), ("attention_mask", mask)) if name in names}
        return again(lambda text, _: forward({**read, _DECODER: text}).logits), [[start]] * len(rows)

    return opening


def with_cache(decoder: nn.Module, examples: Inputs) -> Opening:
    """By a decoder of `decoder_of`, on the device of its examples."""

    def run(ids: Tensor, mask: Tensor, past: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        held = examples.kwargs["past"]
        ids, mask = ids.to(held[0].device), mask.to(held[0].device)
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        before = past or [one.new_zeros(len(ids), one.shape[1], 0, one.shape[3]) for one in held]
        out = decoder(input_ids=ids, attention_mask=mask, position_ids=places, past=before)
        return out["logits"], out["present"]

    return lambda rows: (cached(run), rows)


def of_file(session: Any) -> Opening:
    """By the ONNX file of a decoder with a cache."""
    run = lambda ids, mask, past: step(session, {"input_ids": ids, "attention_mask": mask}, past)  # noqa: E731
    return lambda rows: (cached(run), rows)


def of_parts(encoder: Any, decoder: Any, start: int) -> Opening:
    """By the two ONNX files of an encoder-decoder with a cache."""

    def opening(rows: Ids) -> tuple[Following, Ids]:
        held = encoded(encoder, *(value.numpy() for value in right(rows)))[1]
        run = lambda ids, _, past: decoded(decoder, ids.numpy(), held, past)  # noqa: E731
        return cached(run), [[start]] * len(rows)

    return opening


def of_model(pretrained: Pretrained, inputs: Inputs, tuned: TunedModel | None = None) -> Opening:
    """By a model of transformers in eval mode, as it is or as it is tuned now; without a cache where it takes none.

    Args:
        inputs: of the model without a cache.
        tuned: made of it; in eval mode when it is asked, on the device that it is on now.
    """
    model = pretrained.model if tuned is None else _placed(pretrained.model, tuned)
    device = next(model.parameters()).device
    try:
        found = decoder_of(model, inputs.to(device), tuned, merged=False)
    except SubspanError:
        found = None
    module = pretrained.module if tuned is None else tuned

    def forward(batch: dict[str, Tensor]) -> Any:
        return module(**{name: batch[name].to(device) for name in inputs.kwargs})

    start = getattr(pretrained.model.config, "decoder_start_token_id", None)
    plain = rereading(forward, list(inputs.kwargs), start)
    if found is None:
        return plain
    if tuned is None:
        return with_cache(*found[:2])
    decoder, examples, _ = found
    decoder.graphs["eval"] = last_alone(decoder.graphs["eval"])
    decoder.recompile()
    return _following(tuned, decoder, examples, plain)


def _following(tuned: TunedModel, decoder: nn.Module, examples: Inputs, other: Opening) -> Opening:
    """`with_cache`, by what a tuned model's tensors are then; by another where the trace is not valid for the sizes."""
    plain = with_cache(decoder, examples)

    def opening(rows: Ids) -> tuple[Following, Ids]:
        now = adapter_tensors(tuned)
        for name, value in adapter_tensors(decoder).items():
            if value.data_ptr() != now[name].data_ptr():
                value.data.copy_(now[name])
        return either(plain(rows)[0], other(rows)[0]), rows

    return opening


def _placed(model: nn.Module, tuned: TunedModel) -> nn.Module:
    """A model over the tensors of a tuned one that was made of it, which may have been moved since."""
    other, device = twin(model), next(tuned.parameters()).device
    if other is model or next(model.parameters()).device == device:
        return model
    own = dict(tuned.named_parameters(remove_duplicate=False))
    assign(other, {name: own[name] for name, _ in other.named_parameters()})
    return other.to(device)


def writer(spec: Spec, pretrained: Pretrained, inputs: Inputs, tokens: int) -> Callable[[TunedModel, Ids], list[Said]]:
    """A function from a tuned model in eval mode, whatever its tensors are by then, and rows to what goes on them.

    Args:
        spec: its batch size is read.
        inputs: of the model without a cache.
        tokens: most that a row goes on by.
    """
    processor, size = pretrained.processor, spec.train.batch_size
    set_ends(pretrained.model, spec.task.ends(spec.columns, processor))
    ends, held = ends_of(pretrained.model.config, processor), {}

    def write(model: TunedModel, rows: Ids) -> list[Said]:
        if held.get("model") is not model or model.rows:  # Rows before the tokens are in its cache as they were.
            held.update(model=model, opening=of_model(pretrained, inputs, model), longest=longest_of(pretrained, model))
        found: dict[int, Said] = {}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # Rows of like lengths have little padding.
        for some in (order[start : start + size] for start in range(0, len(rows), size)):
            following, starts = held["opening"]([rows[i] for i in some])
            found |= zip(some, greedy(following, starts, ends, tokens, held["longest"]), strict=True)
        return [found[i] for i in range(len(rows))]

    return write
