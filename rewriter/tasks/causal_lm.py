"""The next token of a text, of a completion, or of the assistant's turns in a chat."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import SpecError
from .base import (
    IGNORED,
    WHOLE,
    WRITTEN,
    Batch,
    Question,
    Reading,
    Role,
    Task,
    padded_lists,
)
from .cells import words
from .chat import (
    ALL,
    ASSISTANT,
    COMPLETION,
    asked,
    at_row,
    clocked,
    disorder,
    objects_of,
    placed,
    tokens_of,
    turn_ends,
    turns_of,
    unprompted,
)
from .measures import likelihoods, perplexity

_SHOWN = 8  # tokens
_Learnt = tuple[list[int], list[bool]]


class CausalLM(Task):
    """Cross entropy of each next token that is learnt, the end of the text among them; labels are shifted already:
    position t holds the token of t + 1."""

    roles = {
        "text": Role("text", False),
        "messages": Role("messages", False),
        "tools": Role("tools", False),
        "prompt": Role("text", False),
        "completion": Role("text", False),
    }
    ways = (("text",), ("messages",), ("messages", "tools"), ("prompt", "completion"))
    metrics = ("perplexity", "loss", "accuracy", *WRITTEN)
    auto = "AutoModelForCausalLM"
    tag = "text-generation"
    headed = False
    smooths = True
    decodes = True
    packs = True
    writes = True

    def useless(self, key: str, value: Any, columns: Mapping[str, str]) -> str | None:
        if key == "long" or (key == "loss" and value == ALL):
            return None
        if key == "loss":
            fits = {ASSISTANT: "messages", COMPLETION: "prompt"}[value] in columns
            return None if fits else f"the columns {', '.join(columns)} have no {value}"
        return None if "messages" in columns else "it is for the column messages"

    def asks_of(self, columns: Mapping[str, str]) -> tuple[str, ...]:
        return next((way[:1] for way in self.ways if way[0] in columns), self.asks)

    def ends(self, columns: Mapping[str, str], processor: Any) -> list[int]:
        """What ends a turn of the assistant, where it is a special token; else the end token, which is learnt."""
        found = turn_ends(processor) if "messages" in columns else []
        return found or [token for token in (processor.eos_token_id,) if token is not None]

    def starts(self, row: Mapping[str, Any], processor: Any) -> list[int]:
        """Turns as the template renders them where the assistant is to answer."""
        if "messages" in row:
            return asked(processor, row["messages"], row.get("tools"))
        ids = processor(str(row.get("prompt", row.get("text"))))["input_ids"]
        ids = ids[_twice(ids, processor) :]
        return ids[:-1] if "prompt" in row and ids[-1:] == [processor.eos_token_id] else ids

    def replies(self, columns: Mapping[str, str]) -> bool:
        return "messages" in columns or "completion" in columns

    def question(self, row: Mapping[str, Any], reading: Reading) -> Question | None:
        """Of a chat the last turn of the assistant, and all turns before it."""
        columns, processor = reading.columns, reading.processor
        if "messages" in columns:
            turns = turns_of(row[columns["messages"]], reading.turns, reading.spoken)
            last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
            answer, asking = turns[last].get("content"), {"messages": turns[:last]}
            if "tools" in columns:
                asking["tools"] = objects_of(row[columns["tools"]])
            if last == 0 or not isinstance(answer, str):
                return None
        else:
            asking, answer = {"prompt": row[columns["prompt"]]}, str(row[columns["completion"]])
        ids = self.starts(asking, processor) if answer.strip() else []
        return Question(list(ids), answer) if ids else None

    def example_batch(self, model: nn.Module, batch: int, length: int, processor: Any = None) -> dict[str, Tensor]:
        inputs = self.inputs(model, batch, length, processor).kwargs
        return {**inputs, "labels": torch.zeros_like(inputs["input_ids"])}

    def encode(self, rows: Any, reading: Reading, notes: list[str]) -> Any:
        """With a note of chats that are odd: some templates say nothing; and of what no tokenizer or template says."""
        found = super().encode(rows, reading, notes)
        if not self.ends(reading.columns, reading.processor):
            said = "the tokenizer has no token that ends a text: none is learnt, and answers do not end by themselves"
            notes.append(f"{said} (eos_token of its tokenizer_config.json)")
        if "messages" not in reading.columns:
            return found
        cells = rows[reading.columns["messages"]]
        chats = [turns_of(cell, reading.turns, reading.spoken) for cell in cells]
        if odd := {i: said for i, turns in enumerate(chats) if (said := disorder(turns))}:
            which = reading.named(list(odd))
            said = f"{len(odd)} of {len(rows)} chats have roles out of order, or turns without text{which}"
            notes.append(f"{said}, e.g. {next(iter(odd.values()))}")
        added = reading.processor.added_tokens_decoder.values()
        special = {*reading.processor.all_special_tokens, *(str(one) for one in added if one.special)}
        pattern = re.compile("|".join(map(re.escape, sorted(special))) or "(?!)")
        if held := {i: first[0] for i, turns in enumerate(chats) if (first := _first(pattern, turns))}:
            said = f"{len(held)} of {len(rows)} chats have special tokens in their texts{reading.named(list(held))}"
            notes.append(f"{said}, which are read as such, e.g. {next(iter(held.values()))}")
        tools = objects_of(rows[0][reading.columns["tools"]]) if "tools" in reading.columns else None
        if start := unprompted(reading.processor, chats[0], tools):
            said = f"the chat template adds nothing where an answer is asked for (add_generation_prompt): {start!r}"
            notes.append(f"{said} before an answer is learnt, and written, too")
        if clocked(reading.processor):
            notes.append("the chat template reads the clock (strftime_now): rows of another day are others")
        return found

    def tokens(self, batch: dict[str, list], index: list[int], reading: Reading) -> dict[str, Any]:
        """A text that is not cut ends with the end token, which is learnt too; one that is split becomes several rows,
        the first token of each but the first being learnt in the one before."""
        columns, out = reading.columns, {"input_ids": [], "attention_mask": [], "labels": [], WHOLE: []}
        read = _chats if "messages" in columns else _completions if "prompt" in columns else _texts
        for number, (ids, learnt) in zip(index, read(batch, index, reading), strict=True):
            whole, length = len(ids), reading.length
            if whole > length and reading.long == "refuse":
                start = f"{reading.processor.decode(ids[:_SHOWN])!r} ..."
                said = f"a text has {whole} tokens: {start}{reading.named([number])}"
                raise SpecError(f"{said}; data.long: truncate or split takes it", ("data", "max_length"))
            labels = [one if kept else IGNORED for one, kept in zip(ids[1:], learnt[1:], strict=True)] + [IGNORED]
            # A last token alone has no next one to learn, and is learnt in the part before.
            starts = range(0, max(whole - 1, 1), length) if reading.long == "split" else (0,)
            for start in starts:
                part = ids[start : start + length]
                own = labels[start : start + length]
                # Truncated, the last token has no next one that is read.
                cut = start + length < whole and reading.long != "split"
                out["labels"].append([*own[:-1], IGNORED] if cut else own)
                out["input_ids"].append(part)
                out["attention_mask"].append([1] * len(part))
                out[WHOLE].append(len(part) if reading.long == "split" else whole)
        return out

    def marks(self, row: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> list[bool]:
        labels = [before["labels"][-1] if before else IGNORED, *row["labels"][:-1]]
        return [one != IGNORED for one in labels]

    def padded_labels(self, labels: list[Any]) -> Tensor:
        return padded_lists(labels)

    def summary(self, out: Any, targets: Batch) -> Tensor:
        return likelihoods(out.logits, targets["labels"])

    def summed(self, summary: Tensor) -> Tensor:
        return summary[:, :2].sum(0)

    def measure(self, metric: str, found: np.ndarray, rows: Any) -> float:
        return perplexity(metric, found)


def _first(special: re.Pattern[str], turns: Sequence[Mapping[str, Any]]) -> re.Match[str] | None:
    return next((found for turn in turns if (found := special.search(turn.get("content", "")))), None)


def _twice(ids: Sequence[int], processor: Any) -> int:
    """1 where a text that starts with the start token got another one before it, else 0."""
    return int(processor.bos_token_id is not None and list(ids[:2]) == [processor.bos_token_id] * 2)


def _ended(ids: list[int], learnt: list[bool], end: int | None) -> _Learnt:
    """With the end token, learnt, once, where a text has any token."""
    if end is None or not ids:
        return ids, learnt
    if ids[-2:] == [end, end]:  # The text's own, and the tokenizer's.
        ids, learnt = ids[:-1], learnt[:-1]
    return ([*ids[:-1], end], [*learnt[:-1], True]) if ids[-1] == end else ([*ids, end], [*learnt, True])


def _texts(batch: dict[str, list], index: list[int], reading: Reading) -> list[_Learnt]:
    """A text that is empty has no tokens, whatever the tokenizer puts around it."""
    processor, texts = reading.processor, words(batch[reading.columns["text"]])
    made = processor(texts, verbose=False)["input_ids"]
    kept = [ids[_twice(ids, processor) :] if text else [] for ids, text in zip(made, texts, strict=True)]
    return [_ended(ids, [True] * len(ids), processor.eos_token_id) for ids in kept]


def _completions(batch: dict[str, list], index: list[int], reading: Reading) -> list[_Learnt]:
    prompts, completions = (words(batch[reading.columns[role]]) for role in ("prompt", "completion"))
    whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    made, found = placed(reading.processor, whole, verbose=False, return_special_tokens_mask=True), []
    parts = (made[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
    for ids, places, special, prompt in zip(*parts, prompts, strict=True):
        # What a prompt and its completion share is the completion's.
        learnt = [
            reading.loss == ALL or (stop > len(prompt) and not added)
            for (_, stop), added in zip(places, special, strict=True)
        ]
        start = _twice(ids, reading.processor)
        found.append(_ended(ids[start:], learnt[start:], reading.processor.eos_token_id))
    return found


def _chats(batch: dict[str, list], index: list[int], reading: Reading) -> list[_Learnt]:
    columns, found, ended, known = reading.columns, [], None, set()
    for place, number in enumerate(index):
        row, tools = number if reading.numbers is None else reading.numbers[number], None
        with at_row(row, columns["messages"], "messages"):
            turns = turns_of(batch[columns["messages"]][place], reading.turns, reading.spoken)
        if "tools" in columns:
            with at_row(row, columns["tools"], "tools"):
                tools = objects_of(batch[columns["tools"]][place])
        try:
            ids, learnt = tokens_of(reading.processor, turns, reading.loss or ASSISTANT, tools, known)
            ended = turn_ends(reading.processor) if ended is None else ended
        except SpecError as error:
            start = f"a chat that starts with {str(turns[0].get('content'))[:40]!r}"
            raise SpecError(f"{error.message} ({start}){reading.named([number])}", error.path) from None
        own = turns[-1]["role"] == "assistant" and not ended
        found.append(_ended(ids, learnt, reading.processor.eos_token_id) if own else (ids, learnt))
    return found
