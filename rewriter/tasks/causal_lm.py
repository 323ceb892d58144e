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
from .chat import (
    ALL,
    ASSISTANT,
    COMPLETION,
    asked,
    clocked,
    disorder,
    objects_of,
    turns_of,
    unprompted,
)
from .measures import likelihoods, perplexity
from .texts import chats, completions, endings, labelled, opening, texts, tools_in, turns_in

_SHOWN = 8  # tokens


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
    defers = True

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
        return endings(processor, "messages" in columns)

    def starts(self, row: Mapping[str, Any], processor: Any) -> list[int]:
        """Turns as the template renders them where the assistant is to answer."""
        if "messages" in row:
            return asked(processor, row["messages"], row.get("tools"))
        return opening(row.get("prompt", row.get("text")), processor, "prompt" in row)

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
        out = {"input_ids": [], "attention_mask": [], "labels": [], WHOLE: []}
        for number, (ids, learnt) in zip(index, _read(batch, index, reading), strict=True):
            whole, length = len(ids), reading.length
            if whole > length and reading.long == "refuse":
                start = f"{reading.processor.decode(ids[:_SHOWN])!r} ..."
                said = f"a text has {whole} tokens: {start}{reading.named([number])}"
                raise SpecError(f"{said}; data.long: truncate or split takes it", ("data", "max_length"))
            labels = labelled(ids, learnt)
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


def _read(batch: dict[str, list], index: list[int], reading: Reading) -> list[tuple[list[int], list[bool]]]:
    columns = reading.columns
    if "messages" in columns:
        tools = tools_in(batch[columns["tools"]], index, reading) if "tools" in columns else None
        return chats(turns_in(batch[columns["messages"]], index, "messages", reading), index, reading, tools)
    if "prompt" in columns:
        return completions(batch[columns["prompt"]], batch[columns["completion"]], reading)
    return texts(batch[columns["text"]], reading)
