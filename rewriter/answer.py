"""Answer: a row in, what a run says of it out, by the file that ships or by what it was made of."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import ModelOutput

from .data import turn_names
from .errors import SubspanError, reason
from .export.choose import SHIPPED
from .export.decoder import step
from .export.encoder_decoder import FILES, decoded, encoded
from .export.ship import load_merged, load_tuned, longest_of
from .export.verify import PAST, cast, fed, has_cache, open_file, outputs_of
from .pretrained import load_processor
from .sources import bars
from .spec import Spec
from .tasks import turns_of
from .tasks.base import Reading

_TEXTS = ("text", "words", "image")


def _is_text(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(_is_text(one) and str(one).strip() for one in value)


# Kind of a role -> what a cell of it is, and whether a value is one.
_CELLS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("text or whole number", _is_text),
    "words": ("list of words, none of them empty", _are_words),
    "tools": ("list of objects", lambda value: value is None or isinstance(value, list)),
    "image": ("path of an image", lambda value: isinstance(value, str)),
}


@dataclass(frozen=True)
class _Opened:
    """A stage of a run: its forward, what that reads, and what stands beside it; of a decoder with a cache its session,
    of an encoder-decoder with one those of its parts."""

    forward: Callable[[dict[str, Tensor]], Any]
    names: Sequence[str]
    processor: Any
    labels: Sequence[str]
    config: Any
    longest: int | None
    session: Any = None
    parts: Sequence[Any] = ()


def rows_of(spec: Spec, lines: Iterable[str]) -> list[dict[str, Any]]:
    """What is asked, a row a line: a text, or an object of JSON with the task's roles, or one with the columns of the
    spec's data, whatever else stands beside them.

    Raises:
        SubspanError: at a line that is none.
    """
    task, rows, columns = spec.task, [], spec.data.columns if spec.data else {}
    asks = task.asks_of(columns)
    kinds = ("tools",) if task.writes else _TEXTS
    texts = [name for name, role in task.roles.items() if role.kind in kinds and name not in ("label", *asks)]
    blank = task.blank(dict.fromkeys([*asks, *texts], ""), [""])
    optional = [name for name in texts if name in columns or name in blank or spec.data is None]
    needed = [name for name in [*asks, *optional] if name not in blank and (name in asks or name in columns)]
    needed = [name for name in needed if task.roles[name].kind != "tools"]
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("{"):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise SubspanError(f"row {number} is no JSON: {reason(error)}") from None
        else:
            row = {needed[0]: line}
        fits = set(needed) <= set(row) <= {*needed, *optional}
        if not fits and columns and {columns[name] for name in needed} <= set(row):
            row = {name: row[columns[name]] for name in [*needed, *optional] if columns.get(name) in row}
        elif not fits:
            like = json.dumps(dict.fromkeys(needed, "..."))
            raise SubspanError(f"row {number} has {', '.join(row) or 'nothing'}; {task.name} reads {like}")
        for name, value in row.items():
            kind = task.roles[name].kind
            if kind == "words" and isinstance(value, str):
                row[name] = value = value.split()
            if kind == "messages":
                row[name] = _asked(spec, value, number)
            elif not _CELLS[kind][1](value):
                raise SubspanError(f"row {number}: {name} is {json.dumps(value)[:40]}, no {_CELLS[kind][0]}")
        rows.append(row)
    return rows


def _asked(spec: Spec, value: Any, number: int) -> list[dict[str, Any]]:
    """A text as the user's turn, or turns as the spec's data has them, less those of the assistant at the end."""
    try:
        turns = turns_of(value, *turn_names(spec.data))
    except (ValueError, RecursionError) as error:
        if isinstance(value, str):
            return [{"role": "user", "content": value}]
        raise SubspanError(f"row {number}: {reason(error)}") from None
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        raise SubspanError(f"row {number}: nobody has asked: all turns are the assistant's")
    return turns


def answerer(
    spec: Spec, run: Path, stage: str = "onnx", tokens: int = 64, notes: list[str] | None = None
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function from a row of `rows_of` to what the run says of it.

    Args:
        spec: of the run.
        run: its folder.
        stage: `onnx`, the file that ships; `merged`, the checkpoint; `tuned`, the base with its adapter.
        tokens: most that a text goes on by; the likeliest one each time, up to the end of the text.
        notes: gets what there is to say of a row: that it is cut.

    Raises:
        SubspanError: the run has no such stage; of a row, that it can't be read, or is longer than a text that goes on
            may be. Other texts are read as far as the spec's `max_length`, like those that were tuned on.
    """
    opened = {"onnx": _onnx, "merged": _merged, "tuned": _tuned}[stage](spec, run)
    task, length = spec.task, spec.data.max_length if spec.data else opened.processor.model_max_length
    collate = task.collator(opened.processor, opened.names, getattr(opened.config, "decoder_start_token_id", None))

    def answer(row: Mapping[str, Any]) -> dict[str, Any]:
        if task.writes:
            ids = task.starts(row, opened.processor)
            if opened.longest is not None and len(ids) >= opened.longest:
                raise SubspanError(
                    f"the text has {len(ids)} tokens; the model takes {opened.longest} with what it writes"
                )
            return {"text": opened.processor.decode(_written(opened, ids, tokens), skip_special_tokens=True)}
        whole = {**row, **task.blank(row, opened.labels)}
        for word in (word for name in row if task.roles[name].kind == "words" for word in row[name]):
            if not opened.processor(str(word), add_special_tokens=False)["input_ids"]:
                raise SubspanError(f"the tokenizer reads nothing of the word {word!r}")
        rows = datasets.Dataset.from_list([whole])
        if task.roles[task.asks[0]].kind == "image":
            rows = rows.cast_column(task.asks[0], datasets.Image())
        reading = Reading({name: name for name in whole}, rows.features, opened.processor, opened.labels, length)
        with bars():
            read = task.encode(rows, reading, [] if notes is None else notes)
        if len(read) == 0:
            raise SubspanError(f"there is nothing to read in {json.dumps(dict(row))}")
        batch = collate([read[i] for i in range(len(read))])
        inputs = {name: batch.pop(name) for name in opened.names}
        return task.answer(opened.forward(inputs), batch, row, opened.labels)

    return answer


@torch.inference_mode()
def _written(opened: _Opened, ids: list[int], tokens: int) -> list[int]:
    """The likeliest next tokens: with the file's own cache, else each of the whole text again."""
    config = opened.config
    ends = config.eos_token_id if config.eos_token_id is not None else opened.processor.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    text = [config.decoder_start_token_id] if "decoder_input_ids" in opened.names else list(ids)
    first, most, following = len(text), opened.longest or 2**31, _following(opened, ids)
    while len(text) - first < min(tokens, most - first):
        token = int(following(text).argmax())
        if token in ends:
            break
        text.append(token)
    return text[first:]


def _following(opened: _Opened, ids: list[int]) -> Callable[[list[int]], Tensor]:
    """Logits (vocabulary) of the token after a text that grows.

    Args:
        ids: of what is read: the text's start, or what an encoder reads.
    """
    whole, past, seen = torch.tensor([ids]), None, 0
    held = encoded(opened.parts[0], whole.numpy(), np.ones_like(whole.numpy()))[1] if opened.parts else {}

    def run(text: list[int]) -> Tensor:
        nonlocal past, seen
        new, mask = torch.tensor([text[seen:]]), torch.ones(1, len(text), dtype=torch.long)
        if opened.parts:
            logits, past = decoded(opened.parts[1], new.numpy(), held, past)
        elif opened.session is not None:
            logits, past = step(opened.session, {"input_ids": new, "attention_mask": mask}, past)
        else:
            batch = {"input_ids": new, "attention_mask": mask}
            if "decoder_input_ids" in opened.names:
                batch = {"input_ids": whole, "attention_mask": torch.ones_like(whole), "decoder_input_ids": new}
            logits = opened.forward({name: batch[name] for name in opened.names}).logits
        seen = 0 if past is None else len(text)
        return torch.as_tensor(logits)[0, -1]

    return run


def _onnx(spec: Spec, run: Path) -> _Opened:
    file = run / "onnx" / SHIPPED
    if not file.is_file():
        raise SubspanError(f"{file} is missing: subspan export {run} writes it")
    session = open_file(file)
    inputs = [value.name for value in session.get_inputs()]
    outputs, cached = outputs_of(session), has_cache(session)
    names = [name for name in inputs if not name.startswith(PAST) and name != "position_ids"]

    def forward(batch: dict[str, Tensor]) -> ModelOutput:
        found = session.run(outputs, fed(session, batch))
        return ModelOutput({name: torch.from_numpy(value) for name, value in zip(outputs, found, strict=True)})

    written = session.get_modelmeta().custom_metadata_map
    labels, longest = json.loads(written["labels"]), json.loads(written.get("longest", "null"))
    config = AutoConfig.from_pretrained(file.parent, trust_remote_code=spec.model.trust_remote_code)
    processor = load_processor(spec, str(file.parent))
    parts = [file.with_name(name) for name in FILES]
    opened = [open_file(part) for part in parts] if all(part.is_file() for part in parts) else []
    return _Opened(forward, names, processor, labels, config, longest, session if cached else None, opened)


def _merged(spec: Spec, run: Path) -> _Opened:
    folder = run / "merged"
    if not folder.is_dir():
        raise SubspanError(f"{folder} is missing: subspan export {run} writes it, unless something can't merge")
    pretrained, processor = load_merged(spec, folder), load_processor(spec, str(folder))
    names = list(spec.task.inputs(pretrained.model, processor=processor).kwargs)
    return _of_module(pretrained.module, names, pretrained, processor, longest_of(pretrained))


def _tuned(spec: Spec, run: Path) -> _Opened:
    pretrained, processor, inputs, _, tuned = load_tuned(spec, run)
    return _of_module(tuned.eval(), list(inputs.kwargs), pretrained, processor, longest_of(pretrained, tuned))


def _of_module(
    module: torch.nn.Module, names: list[str], pretrained: Any, processor: Any, longest: int | None
) -> _Opened:
    dtype = next(module.parameters()).dtype

    @torch.inference_mode()
    def forward(batch: dict[str, Tensor]) -> Any:
        return module(**cast(batch, dtype))

    return _Opened(forward, names, processor, pretrained.labels, pretrained.model.config, longest)
