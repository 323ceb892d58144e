"""The span of a text that answers a question."""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import SpecError
from .base import PLAIN, Batch, Collate, Criterion, Options, Reading, Role, Task, cross_entropy, padded, padded_lists

OUTSIDE = -1
TARGETS = ("start_positions", "end_positions", "starts", "ends", "row")


class AnswerOptions(Options):
    """How long texts are cut into windows, and what an answer may be."""

    stride: int = Field(32, ge=0, description="tokens that two windows of one text share")
    longest: int = Field(30, ge=1, description="longest answer, in tokens")


class QuestionAnswering(Task):
    """Answers as SQuAD writes them: {text: [...], answer_start: [...]}, both empty where the text has none.

    A context that is too long is read in windows. The first answer is learned, all of them count when it is measured.
    Where a window has no answer its first token is the span; only data with unanswerable questions is measured by that.
    """

    Options = AnswerOptions
    asks = ("question", "context")
    roles = {"question": Role("text"), "context": Role("text"), "answers": Role("answers")}
    metrics = ("f1", "exact_match", "loss")
    auto = "AutoModelForQuestionAnswering"
    tag = "question-answering"

    def example_batch(self, model: nn.Module, batch: int, length: int, processor: Any = None) -> dict[str, Tensor]:
        inputs = self.inputs(model, batch, length, processor).kwargs
        zeros = torch.zeros(batch, dtype=torch.long, device=next(model.parameters()).device)
        return {**inputs, "start_positions": zeros, "end_positions": zeros}

    def check(self, rows: Any, columns: Mapping[str, str], labels: Sequence[str]) -> None:
        path = ("data", "columns", "answers")
        missing = {"text", "answer_start"} - set(rows.features[columns["answers"]])
        if missing:
            raise SpecError(f"column {columns['answers']!r} has no {min(missing)}: SQuAD's answers have both", path)
        for row, (context, answers) in enumerate(zip(rows[columns["context"]], rows[columns["answers"]], strict=True)):
            texts, starts = map((answers or {}).get, ("text", "answer_start"))
            if texts is None or starts is None:
                said = f"row {row} holds {answers!r}; a question without an answer has {{text: [], answer_start: []}}"
                raise SpecError(said, path)
            if len(texts) != len(starts):
                raise SpecError(f"row {row} has {len(texts)} answers and {len(starts)} starts", path)
            for text, start in zip(texts, starts, strict=True):
                if not isinstance(start, int) or not isinstance(text, str):
                    raise SpecError(f"row {row} holds {answers!r}: answers are texts, and starts whole numbers", path)
                there = (context or "")[start : start + len(text)] if start >= 0 else None
                if not text or there != text:
                    raise SpecError(f"row {row}: the context has {there!r} at {start}, not the answer {text!r}", path)

    def encode(self, rows: Any, reading: Reading, notes: list[str]) -> Any:
        if not reading.processor.is_fast:
            raise SpecError("spans need a fast tokenizer, which says where tokens stand", ("model", "name"))
        return super().encode(rows, reading, notes)

    def tokens(self, batch: dict[str, list], index: list[int], reading: Reading) -> dict[str, Any]:
        """A row for every window of a text."""
        columns, stride = reading.columns, self.options.stride
        questions = [str(question or "").strip() for question in batch[columns["question"]]]
        contexts = [str(context or "") for context in batch[columns["context"]]]
        longest = max(len(ids) for ids in reading.processor(questions)["input_ids"])
        if longest + 2 + stride >= reading.length:
            said = f"a question has {longest} tokens, which leaves no room for a context and a stride of {stride}"
            raise SpecError(said, ("data", "max_length"))
        out = reading.processor(
            questions,
            contexts,
            truncation="only_second",
            max_length=reading.length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows, places = out.pop("overflow_to_sample_mapping"), out.pop("offset_mapping")
        answers = batch[columns["answers"]]
        made: dict[str, list] = {name: [] for name in ("start_positions", "end_positions", "starts", "ends")}
        for i, (row, offsets) in enumerate(zip(windows, places, strict=True)):
            inside = [part == 1 for part in out.sequence_ids(i)]
            starts, ends = ([o[k] if own else OUTSIDE for o, own in zip(offsets, inside, strict=True)] for k in (0, 1))
            span = _span(starts, ends, answers[row])
            for name, value in zip(made, (*span, starts, ends), strict=True):
                made[name].append(value)
        texts = {"row": [index[row] for row in windows], "context": [contexts[row] for row in windows]}
        return {**out, **made, **texts, "answers": [answers[row]["text"] for row in windows]}

    def collator(self, processor: Any, input_names: Sequence[str], start: int | None) -> Collate:
        """Targets: the span's first and last token (batch,), where each token of the context starts and ends in it,
        -1 for all others (batch, sequence); the window's row (batch,)."""

        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            batch = padded(processor, rows)
            for name in ("start_positions", "end_positions", "row"):
                batch[name] = torch.tensor([row[name] for row in rows])
            for name in ("starts", "ends"):
                batch[name] = padded_lists([row[name] for row in rows], OUTSIDE)
            return {name: batch[name] for name in (*input_names, *TARGETS)}

        return collate

    def count(self, targets: Batch, criterion: Criterion = PLAIN) -> Tensor:
        return torch.tensor(len(targets["start_positions"]), device=targets["start_positions"].device)

    def loss(self, out: Any, targets: Batch, criterion: Criterion = PLAIN) -> Tensor:
        """The mean of the cross entropies of the first and the last token, summed over windows."""
        first = cross_entropy(out.start_logits, targets["start_positions"])
        return (first + cross_entropy(out.end_logits, targets["end_positions"])) / 2

    def summary(self, out: Any, targets: Batch) -> Tensor:
        """(windows, 5): row, best span's start and end in the context, its score, the score of no answer."""
        first, last = out.start_logits.double(), out.end_logits.double()
        inside = targets["starts"] != OUTSIDE
        scores = first.unsqueeze(2) + last.unsqueeze(1)
        ones = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device)
        allowed = ones.triu() & ~ones.triu(self.options.longest) & inside.unsqueeze(2) & inside.unsqueeze(1)
        score, place = scores.masked_fill(~allowed, -torch.inf).flatten(1).max(1)
        width = scores.shape[2]
        start = targets["starts"].gather(1, (place // width).unsqueeze(1)).squeeze(1)
        end = targets["ends"].gather(1, (place % width).unsqueeze(1)).squeeze(1)
        nothing = first[:, 0] + last[:, 0]
        return torch.stack([targets["row"].double(), start.double(), end.double(), score, nothing], dim=1)

    def draws(self, metric: str) -> bool:
        """Windows of one text count together."""
        return False

    def blank(self, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        return {"answers": {"text": [], "answer_start": []}}

    def answer(self, out: Any, targets: Batch, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        """The best span, where it stands in the context, its score, and that of no answer: sums of two logits; no
        score where nothing of the context was read."""
        found = self.summary(out, targets)
        _, start, end, score, _ = found[found[:, 3].argmax()].tolist()
        start, end, score = (start, end, score) if score > -np.inf else (0, 0, None)
        span = {"start": int(start), "end": int(end), "score": score, "no_answer": found[:, 4].min().item()}
        return {"answer": str(row["context"])[int(start) : int(end)], **span}

    def measure(self, metric: str, found: np.ndarray, rows: Any) -> float:
        best: dict[int, tuple[float, int, int]] = {}
        nothing: dict[int, float] = {}
        for row, start, end, score, none in found.tolist():
            best[int(row)] = max(best.get(int(row), (-np.inf, 0, 0)), (score, int(start), int(end)))
            nothing[int(row)] = min(nothing.get(int(row), np.inf), none)
        texts = {
            row: (context, answers)
            for row, context, answers in zip(*(rows[k] for k in ("row", "context", "answers")), strict=True)
        }
        unanswerable = any(not answers for _, answers in texts.values())
        score = exact if metric == "exact_match" else overlap
        values = []
        for row, (context, answers) in texts.items():
            value, start, end = best[row]
            guess = "" if unanswerable and nothing[row] > value else context[start:end]
            values.append(max((score(guess, answer) for answer in answers), default=float(not guess)))
        return float(np.mean(values))


def _span(starts: list[int], ends: list[int], answers: Mapping[str, list]) -> tuple[int, int]:
    """First and last token of the first answer; the first token of the window, twice, where it is not whole in it."""
    if answers["text"]:
        begin = answers["answer_start"][0]
        stop = begin + len(answers["text"][0])
        tokens = [
            i for i, (a, b) in enumerate(zip(starts, ends, strict=True)) if a != OUTSIDE and a < stop and b > begin
        ]
        if tokens and starts[tokens[0]] <= begin and ends[tokens[-1]] >= stop:
            return tokens[0], tokens[-1]
    return 0, 0


def plain(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces, as SQuAD's own evaluation compares."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(guess: str, answer: str) -> float:
    """1 where both are the same, plainly."""
    return float(plain(guess) == plain(answer))


def overlap(guess: str, answer: str) -> float:
    """F1 of the words that both have, each as often as both do (Rajpurkar et al., SQuAD, arXiv 1606.05250)."""
    ours, theirs = plain(guess).split(), plain(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))
