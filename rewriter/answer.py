"""Answer: a row in, what a run says of it out, by the file that ships or by what it was made of."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import ModelOutput

from .chats import text_reader, turns_made
from .data import turn_names
from .errors import SpecError, SubspanError, reason
from .export.choose import SHIPPED
from .export.encoder_decoder import FILES
from .export.ship import load_merged, load_tuned, longest_of
from .export.verify import PAST, cast, fed, has_cache, open_file, outputs_of
from .export.writing import of_file, of_model, of_parts, rereading
from .greedy import Opening, greedy
from .pretrained import Pretrained, ends_of, load_model, load_processor, processor_of, set_ends
from .sources import bars
from .spec import Data, Spec
from .tasks import turns_of
from .tasks.base import Reading
from .tuned import TunedModel

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
    """A stage of a run: its forward, what that reads, what stands beside it, and how it writes, if it does."""

    forward: Callable[[dict[str, Tensor]], Any]
    names: Sequence[str]
    processor: Any
    labels: Sequence[str]
    config: Any
    longest: int | None
    opening: Opening | None = None


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
            row = line if spec.data and spec.data.asked else {needed[0]: line}
        if spec.data and spec.data.chat and not (isinstance(row, dict) and set(row) <= {*needed, *optional}):
            row = {needed[0]: _made(spec.data, row, number)}
        fits = set(needed) <= set(row) <= {*needed, *optional}
        if not fits and columns and {columns[name] for name in needed} <= set(row):
            row = {name: row[columns[name]] for name in [*needed, *optional] if columns.get(name) in row}
        elif not fits:
            like = json.dumps(dict.fromkeys(needed, "..."))
            raise SubspanError(f"row {number} has {', '.join(row) or 'nothing'}; {task.name} reads {like}")
        for name, value in row.items():
            kind = task.kind(name, columns)
            if kind == "words" and isinstance(value, str):
                row[name] = value = value.split()
            if kind == "messages":
                row[name] = _asked(spec, value, number)
            elif not _CELLS[kind][1](value):
                raise SubspanError(f"row {number}: {name} is {json.dumps(value)[:40]}, no {_CELLS[kind][0]}")
        rows.append(row)
    return rows


def _made(data: Data, row: Any, number: int) -> list[dict[str, str]]:
    """The turns that a row's columns are put in, or a text, which is the cell of the only column that is asked of."""
    cells = row if isinstance(row, dict) else {data.asked[0]: row} if len(data.asked) == 1 else {}
    if missing := [column for column in data.asked if column not in cells]:
        like = json.dumps(dict.fromkeys(data.asked, "..."))
        raise SubspanError(f"row {number} has no {', '.join(missing)}; data.chat asks of {like}")
    try:
        known = {one: text_reader(one, data.reads[one], data)(number, cells[one]) for one in data.asked}
    except SpecError as error:
        raise SubspanError(error.message) from None
    return turns_made(data, known, asked=True)


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


STAGES = ("onnx", "merged", "tuned", "base")
Tell = Callable[[str], None]


def answerer(
    spec: Spec, run: Path, stage: str = "onnx", tokens: int = 64, notes: list[str] | None = None
) -> Callable[..., dict[str, Any]]:
    """A function from a row of `rows_of` to what the run says of it; its second argument, if there is one, gets a text
    piece by piece while it is written.

    Args:
        spec: of the run.
        run: its folder.
        stage: `onnx`, the file that ships; `merged`, the checkpoint; `tuned`, the base with its adapter; `base`, the
            pretrained model alone.
        tokens: most that a text goes on by; the likeliest one each time, up to the end of the text.
        notes: gets what there is to say of a row: that it is cut.

    Raises:
        SubspanError: the run has no such stage; of a row, that it can't be read, or is longer than a text that goes on
            may be. Other texts are read as far as the spec's `max_length`, like those that were tuned on.
    """
    opened = dict(zip(STAGES, (_onnx, _merged, _tuned, _base), strict=True))[stage](spec, run)
    task, length = spec.task, spec.data.max_length if spec.data else opened.processor.model_max_length
    collate = task.collator(opened.processor, opened.names, getattr(opened.config, "decoder_start_token_id", None))

    def answer(row: Mapping[str, Any], tell: Tell | None = None) -> dict[str, Any]:
        if task.writes:
            return {"text": _written(opened, task.starts(row, opened.processor), tokens, tell)}
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


def _written(opened: _Opened, ids: list[int], tokens: int, tell: Tell | None) -> str:
    """What goes on a text, or is written of it."""
    longest = opened.longest
    if longest is not None and len(ids) >= longest:
        raise SubspanError(f"the text has {len(ids)} tokens; the model takes {longest} with what it writes")
    if not ids:
        raise SubspanError("there is nothing to go on from: the tokenizer reads no token")
    following, starts = opened.opening([ids])
    pieces = _Pieces(opened.processor, tell)
    said = greedy(following, starts, ends_of(opened.config, opened.processor), tokens, longest, pieces.add)[0]
    text = opened.processor.decode(said.ids, skip_special_tokens=True)
    pieces.close(text)
    return text


class _Pieces:
    """Tells a text piece by piece as its tokens come: no character before all its bytes are there."""

    def __init__(self, processor: Any, tell: Tell | None):
        self.processor, self.tell, self.ids, self.told = processor, tell, [], ""

    def add(self, row: int, token: int) -> None:
        self.ids.append(token)
        if self.tell is not None:
            text = self.processor.decode(self.ids, skip_special_tokens=True)
            if not text.endswith("\ufffd") and text.startswith(self.told):
                self.close(text)

    def close(self, text: str) -> None:
        if self.tell is not None and len(text) > len(self.told):
            self.tell(text[len(self.told) :])
            self.told = text


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
    parts, start = [file.with_name(name) for name in FILES], getattr(config, "decoder_start_token_id", None)
    if all(part.is_file() for part in parts):
        opening = of_parts(*map(open_file, parts), start)
    else:
        opening = of_file(session) if cached else rereading(forward, names, start)
    return _Opened(forward, names, processor, labels, config, longest, opening)


def _merged(spec: Spec, run: Path) -> _Opened:
    folder = run / "merged"
    if not folder.is_dir():
        raise SubspanError(f"{folder} is missing: subspan export {run} writes it, unless something can't merge")
    pretrained, processor = load_merged(spec, folder), load_processor(spec, str(folder))
    return _of_module(spec, pretrained, processor)


def _tuned(spec: Spec, run: Path) -> _Opened:
    pretrained, processor, _, _, tuned = load_tuned(spec, run)
    return _of_module(spec, pretrained, processor, tuned.eval())


def _base(spec: Spec, run: Path) -> _Opened:
    pretrained = load_model(spec)
    processor = processor_of(spec, pretrained)
    set_ends(pretrained.model, spec.task.ends(spec.columns, processor))
    return _of_module(spec, pretrained, processor)


def _of_module(spec: Spec, pretrained: Pretrained, processor: Any, tuned: TunedModel | None = None) -> _Opened:
    module = pretrained.module if tuned is None else tuned
    inputs, dtype = spec.task.inputs(pretrained.model, processor=processor), next(module.parameters()).dtype
    longest = longest_of(pretrained, tuned)

    @torch.inference_mode()
    def forward(batch: dict[str, Tensor]) -> Any:
        return module(**cast(batch, dtype))

    opening = of_model(pretrained, inputs, tuned) if spec.task.writes else None
    names = list(inputs.kwargs)
    return _Opened(forward, names, processor, pretrained.labels, pretrained.model.config, longest, opening)
