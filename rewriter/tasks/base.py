"""What a task is: columns, encoding, collation, loss, metrics, example inputs, what is traced, and what is shipped.

`Task` reads one text a row; a task overrides what differs. Tensors of a batch that the model does not read are its
targets, by name.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ..graph.deferred import Deferred
from ..graph.traced import Inputs
from .cells import class_reader, words

IGNORED = -100
WHOLE, LEARNT = "whole", "learnt"
_SHOWN = 5  # rows
LOWER = ("loss", "mse", "perplexity")
WRITTEN = ("exact_match", "rouge", "bleu")  # Measured of what a task that writes has written.

Batch = Mapping[str, Tensor]
Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


class Options(BaseModel):
    """Options of a task, `model.task_options` in a spec; none, unless it has its own."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


@dataclass(frozen=True)
class Role:
    """A column that a task reads.

    Attributes:
        kind: what its cells hold: text, label, labels (a list of them), words, number, image, answers, messages, tools.
        required: whether a spec has to name it.
    """

    kind: str
    required: bool = True


@dataclass(frozen=True)
class Criterion:
    """How a training loss differs from the plain one that is measured.

    Attributes:
        smoothing: share of a label's mass that is spread over all labels.
        weights: (labels,) weight of each label's terms; None: all alike.
    """

    smoothing: float = 0.0
    weights: Tensor | None = None


PLAIN = Criterion()


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    Attributes:
        columns: role -> column.
        features: of `datasets`, by column.
        processor: the tokenizer, or the image processor.
        labels: class names in order.
        length: longest sequence, in tokens.
        long: what becomes of longer ones: `truncate`, `split` or `refuse`.
        loss: which tokens are learnt; None: as the task says.
        turns: what a turn's `role` and `content` are called.
        spoken: a turn's role as written -> as templates call it.
        numbers: (rows,) of the rows in their file; None where they are of none.
        parts: (rows,) which part of a mixture a row is of; None where there is no mixture.
    """

    columns: Mapping[str, str]
    features: Mapping[str, Any]
    processor: Any
    labels: Sequence[str]
    length: int
    long: str = "truncate"
    loss: str | None = None
    turns: Mapping[str, str] = field(default_factory=lambda: {"role": "role", "content": "content"})
    spoken: Mapping[str, str] = field(default_factory=dict)
    numbers: np.ndarray | None = None
    parts: np.ndarray | None = None

    def named(self, rows: Sequence[int]) -> str:
        """Rows by their numbers in the file, the first few: ` (rows 3, 8)`, ` (row 3 of mixture[0])`; nothing where
        they have none."""
        if self.numbers is None or not len(rows):
            return ""
        numbers = self.numbers[list(rows)].tolist()
        parts = [0] * len(numbers) if self.parts is None else self.parts[list(rows)].tolist()
        places = sorted({*zip(parts, numbers, strict=True)})  # By its weight a row of a part is there several times.
        more = ", ..." * (len(places) > _SHOWN)
        if self.parts is None:
            return f" (row{'s' * (len(places) > 1)} {', '.join(str(number) for _, number in places[:_SHOWN])}{more})"
        return f" ({', '.join(f'row {number} of mixture[{part}]' for part, number in places[:_SHOWN])}{more})"


@dataclass(frozen=True)
class Question:
    """What a row asks.

    Attributes:
        ids: tokens that a text goes on from, or that it is written of.
        answer: what the row says.
    """

    ids: list[int]
    answer: str


class Task:
    """One text a row, or two; what a row's loss and output are is a subclass's.

    Attributes:
        name: as a spec writes it.
        options: of the class's `Options`.
        roles: the columns it reads.
        metrics: what can be measured, the default first.
        auto: the class of transformers that loads the model.
        tag: the pipeline that hubs list it under.
        processor: the class of transformers that loads the tokenizer, or the image processor.
        headed: whether what lies outside the base model is a new head where a checkpoint has none.
        labelled: whether it has class names.
        smooths: whether label smoothing has a meaning.
        decodes: whether outputs are of the next token, from which a text goes on.
        writes: whether its answer is a text, written token by token.
        defers: whether its loss and summary take logits that are not computed yet (`Deferred`).
        reference: what a row has of the model before it is tuned, by name, where the loss reads that: see `refers`.
        sequences: whether rows differ in length.
        packs: whether several rows can stand in one sequence: its encoded rows have token ids, and a label of each.
        asks: the roles that a question has; the others are its answer.
        ways: the roles that go together, where there are several ways.
    """

    Options: ClassVar[type[Options]] = Options
    roles: ClassVar[dict[str, Role]] = {"text": Role("text"), "label": Role("label"), "text_pair": Role("text", False)}
    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    auto: ClassVar[str]
    tag: ClassVar[str] = "text-classification"
    processor: ClassVar[str] = "AutoTokenizer"
    headed: ClassVar[bool] = True
    labelled: ClassVar[bool] = False
    smooths: ClassVar[bool] = False
    decodes: ClassVar[bool] = False
    writes: ClassVar[bool] = False
    defers: ClassVar[bool] = False
    reference: tuple[str, ...] = ()
    sequences: ClassVar[bool] = True
    packs: ClassVar[bool] = False
    asks: ClassVar[tuple[str, ...]] = ("text",)
    ways: ClassVar[tuple[tuple[str, ...], ...]] = ()

    def __init__(self, name: str, options: Options):
        self.name, self.options = name, options

    # What a spec may say.

    def metrics_of(self, columns: Mapping[str, str]) -> tuple[str, ...]:
        """The metrics that data with these roles -> columns can be measured by, the default first."""
        told = not columns or self.replies(columns)
        return tuple(one for one in self.metrics if told or not self.written(one))

    def written(self, metric: str) -> bool:
        """Whether a metric is one of what is written, not of outputs."""
        return self.writes and metric in WRITTEN

    def replies(self, columns: Mapping[str, str]) -> bool:
        """Whether rows with these roles -> columns have an answer that what is written can be compared with."""
        return False

    def useless(self, key: str, value: Any, columns: Mapping[str, str]) -> str | None:
        """Why a key of a spec's data that says how texts become tokens (`long`, `template`, `loss`, `turns`) is of no
        use with these roles -> columns; None where it is of use."""
        return f"{self.name} has no use for it"

    def kind(self, role: str, columns: Mapping[str, str]) -> str:
        """What a role's cells hold where data has these roles -> columns."""
        return self.roles[role].kind

    def least(self, columns: Mapping[str, str]) -> int:
        """The fewest rows of a batch that have something to learn from."""
        return 1

    @staticmethod
    def lower(metric: str) -> bool:
        """Whether less of a metric is better."""
        return metric in LOWER

    # The model.

    def configure(self, config: Any, labels: Sequence[str] | None) -> None:
        """Set what the task needs in a model's config, before the model is made."""

    def settle(self, processor: Any) -> None:
        """Set a tokenizer or an image processor as the task reads by it. In place.

        Raises:
            SpecError: the task can't read by it.
        """

    def labels(self, config: Any) -> list[str]:
        """Class names in order; empty for tasks without classes."""
        return [config.id2label[i] for i in range(config.num_labels)] if self.labelled else []

    def module(self, model: nn.Module, revision: str | None = None) -> nn.Module:
        """What is traced, tuned and exported; its parameters have the model's own names.

        Raises:
            SpecError: the model is none that the task can use.
        """
        return model

    def inputs(self, model: nn.Module, batch: int = 3, length: int = 11, processor: Any = None) -> Inputs:
        """Examples of what the model reads, on its device, with dynamic batch and sequence.

        Token ids are (batch, sequence) int64.

        Args:
            batch, length: sizes of the examples.
            processor: decides the sizes that a model leaves open.

        Raises:
            SpecError: the model can't read what the task gives it.
        """
        names = ["input_ids", "attention_mask"]
        segments = getattr(model.config, "type_vocab_size", 0) > 1
        if segments and "token_type_ids" in inspect.signature(model.forward).parameters:
            names.append("token_type_ids")
        return token_inputs(model, dict.fromkeys(names, length), batch)

    def example_batch(self, model: nn.Module, batch: int, length: int, processor: Any = None) -> dict[str, Tensor]:
        """A batch of `batch` rows as a training step reads it: inputs and targets."""
        inputs = self.inputs(model, batch, length, processor).kwargs
        return {**inputs, "labels": torch.zeros(batch, dtype=torch.long, device=next(model.parameters()).device)}

    # The data.

    def check(self, rows: Any, columns: Mapping[str, str], labels: Sequence[str]) -> None:
        """Refuse rows (of `datasets`) whose cells are none that the task reads.

        Raises:
            SpecError: at the role's column, with the first cell that is wrong.
        """

    def reader(self, feature: Any, labels: Sequence[str]) -> Callable[[Any], Any]:
        """A function from a label as written to a class index; ValueError for what is none."""
        return class_reader(feature, labels)

    def label_counts(self, rows: Any, columns: Mapping[str, str], labels: Sequence[str]) -> list[int]:
        """How often each label stands in the rows."""
        column = columns["label"]
        read = self.reader(rows.features[column], labels)
        counts = [0] * len(labels)
        for value in rows[column][:]:
            for one in value if isinstance(value, list) else [value]:
                counts[read(one)] += 1
        return counts

    def encode(self, rows: Any, reading: Reading, notes: list[str]) -> Any:
        """Rows of `datasets` as the model reads them: token ids, and targets. Rows without anything to learn from are
        left out.

        Args:
            notes: gets what there is to say of the rows.

        Raises:
            SpecError: the tokenizer can't do what the task needs.
        """

        def tokens(batch: dict[str, list], index: list[int]) -> dict[str, Any]:
            out = dict(self.tokens(batch, index, reading))
            made = [dict(zip(out, row, strict=True)) for row in zip(*out.values(), strict=True)]
            return {**out, LEARNT: [self.learnt(row) for row in made]}

        options = {"batched": True, "with_indices": True, "load_from_cache_file": False, "desc": "encode"}
        found = rows.map(tokens, remove_columns=rows.column_names, **options)
        if WHOLE in found.column_names:
            whole = np.array(found[WHOLE])
            kept = np.minimum(whole, reading.length)
            if len(cut := np.flatnonzero(whole > kept)):
                share = 100 * (1 - kept.sum() / whole.sum())
                which = reading.named(cut) if len(whole) == len(rows) else ""
                notes.append(
                    f"{len(cut)} of {len(whole)} rows are cut to {reading.length} tokens{which}: {share:.1f}% of all "
                    "tokens are not read (data.max_length)"
                )
            found = found.remove_columns(WHOLE)
        some = np.array(found[LEARNT], bool)
        if len(left := np.flatnonzero(~some)):
            which = reading.named(left) if len(found) == len(rows) else ""
            notes.append(f"{len(left)} of {len(found)} rows have nothing to learn from and are left out{which}")
            found = found.select(np.flatnonzero(some))
        return found.remove_columns(LEARNT)

    def tokens(self, batch: dict[str, list], index: list[int], reading: Reading) -> dict[str, Any]:
        """`encode` of some rows, whose numbers are in `index`; `WHOLE`: their tokens before they are cut."""
        out = tokenised(batch, reading)
        column = reading.columns["label"]
        read = self.reader(reading.features[column], reading.labels)
        out["labels"] = [read(value) for value in batch[column]]
        return out

    def learnt(self, row: Mapping[str, Any]) -> int:
        """How many labels of an encoded row are learnt; 0 where it has no token to read."""
        labels = row.get("labels")
        count = sum(one != IGNORED for one in labels) if isinstance(labels, list) else 1
        return count if len(row["input_ids"]) else 0

    def parts(self, row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """The sequences of tokens in an encoded row, by name; a single one has none."""
        return {"": row} if "input_ids" in row else {}

    def marks(self, row: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> list[bool]:
        """Of each token of an encoded row, whether it is learnt, or has a label that is.

        Args:
            before: the row before it, whose last token may be followed by this one's first.
        """
        labels = row.get("labels")
        own = isinstance(labels, list) and len(labels) == len(row["input_ids"])
        return [one != IGNORED for one in labels] if own else [False] * len(row["input_ids"])

    def length(self, row: Mapping[str, Any]) -> int:
        """Tokens of an encoded row, for batches of rows of like lengths."""
        return len(row["input_ids"])

    def collator(self, processor: Any, input_names: Sequence[str], start: int | None) -> Collate:
        """A function from encoded rows to a batch, padded to its longest row: the model's inputs, and targets.

        Args:
            processor: the tokenizer; padding stands on the right, where it moves no position.
            input_names: what the model reads.
            start: the id that starts a decoder's input (encoder-decoder models).
        """

        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            batch = padded(processor, rows)
            batch["labels"] = self.padded_labels([row["labels"] for row in rows])
            return {name: batch[name] for name in (*input_names, "labels")}

        return collate

    def padded_labels(self, labels: list[Any]) -> Tensor:
        """The rows' labels as one tensor."""
        return torch.tensor(labels)

    # What is learned and measured.

    def count(self, targets: Batch, criterion: Criterion = PLAIN) -> Tensor:
        """What the sum of the losses of batches is divided by for their mean: a scalar that adds up over batches."""
        return counted(targets["labels"], criterion)

    def loss(self, out: Any, targets: Batch, criterion: Criterion = PLAIN) -> Tensor:
        """The sum of a batch's losses, a scalar, from the model's output: cross entropy of logits (batch, classes) or
        (batch, sequence, classes) with labels of the shape before the last."""
        return cross_entropy(out.logits, targets["labels"], criterion)

    def summary(self, out: Any, targets: Batch) -> Tensor:
        """What metrics need of a batch, small: (n, k), a row for each thing that is measured."""
        raise NotImplementedError

    def summed(self, summary: Tensor) -> Tensor | None:
        """(2,) the plain loss and its `count`, where a summary says them; None where it does not."""
        return None

    def refers(self, out: Any, targets: Batch) -> Tensor:
        """What `reference` names of each row of a batch, from the output of the model before it is tuned: (n, k)."""
        raise NotImplementedError

    def measure(self, metric: str, found: np.ndarray, rows: Any) -> float:
        """A metric, other than `loss`, from the summaries of all batches, (n, k) float64, in any order.

        Args:
            rows: the encoded rows.
        """
        raise NotImplementedError

    def draws(self, metric: str) -> bool:
        """Whether a metric is one of rows that can be drawn with replacement: each counts by itself."""
        return True

    # What is asked.

    def asks_of(self, columns: Mapping[str, str]) -> tuple[str, ...]:
        """The roles that a question has where data has these roles -> columns."""
        return self.asks

    def ends(self, columns: Mapping[str, str], processor: Any) -> list[int]:
        """The tokens that end what is written, beside the model's own."""
        return []

    def starts(self, row: Mapping[str, Any], processor: Any) -> list[int]:
        """The token ids that a text goes on from, or that it is written of."""
        return processor(str(row["text"]))["input_ids"]

    def question(self, row: Mapping[str, Any], reading: Reading) -> Question | None:
        """What a row of the data asks; None where it asks or answers nothing."""
        return None

    def blank(self, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        """What stands for the answer in a row that is asked, where `encode` reads one."""
        return {"label": labels[0]} if labels else {}

    def answer(self, out: Any, targets: Batch, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        """What the model's output on a row that is asked says: here its label, and the probability of each."""
        scores = out.logits[0].double().softmax(-1).tolist()
        return {"label": labels[int(np.argmax(scores))], "scores": dict(zip(labels, scores, strict=True))}

    # What is shipped.

    def metadata(self, labels: Sequence[str]) -> dict[str, Any]:
        """What a server needs to know beside the labels, for the ONNX file."""
        return {}

    def ship(self, folder: Path, model: nn.Module, max_length: int) -> None:
        """Write what other libraries read beside a merged checkpoint into its folder."""


def name_labels(config: Any, labels: Sequence[str] | None, problem: str | None = None) -> None:
    """Put class names into a model's config, if there are any."""
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
        config.problem_type = problem


def token_inputs(model: nn.Module, lengths: Mapping[str, int], batch: int) -> Inputs:
    """Example token ids of these lengths, on the model's device; masks are 1, all else 0."""
    device = next(model.parameters()).device
    kwargs = {
        name: torch.full((batch, n), int(name == "attention_mask"), dtype=torch.long, device=device)
        for name, n in lengths.items()
    }
    axes = {n: {0: "batch", 1: "decoder_sequence" if n.startswith("decoder") else "sequence"} for n in kwargs}
    return Inputs(kwargs=kwargs, dynamic=axes)


def tokenised(batch: dict[str, list], reading: Reading) -> Any:
    """The token ids of a text column, and of its pair if there is one."""
    columns = reading.columns
    pair = words(batch[columns["text_pair"]]) if "text_pair" in columns else None
    return cut_off(reading, words(batch[columns["text"]]), pair)


def cut_off(reading: Reading, *texts: Any, **options: Any) -> Any:
    """What the tokenizer makes of texts, cut to the length that is read; `WHOLE`: their tokens before that."""
    out = reading.processor(*texts, verbose=False, **options)
    whole = [len(ids) for ids in out["input_ids"]]
    if max(whole, default=0) > reading.length:
        out = reading.processor(*texts, truncation=True, max_length=reading.length, **options)
    out[WHOLE] = whole
    return out


def padded(processor: Any, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Token ids, mask and segments of encoded rows, padded to the longest on the right."""
    keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in rows[0]]
    texts = [{key: row[key] for key in keys} for row in rows]
    batch = dict(processor.pad(texts, return_tensors="pt", padding_side="right"))
    batch.setdefault("token_type_ids", torch.zeros_like(batch["input_ids"]))
    return batch


def padded_lists(lists: list[list[int]], value: int = IGNORED) -> Tensor:
    """Lists of numbers as one tensor, (rows, longest)."""
    width = max(map(len, lists))
    return torch.tensor([[*one, *[value] * (width - len(one))] for one in lists])


def cross_entropy(logits: Tensor | Deferred, labels: Tensor, criterion: Criterion = PLAIN) -> Tensor:
    """The sum of the cross entropies of labels that are not ignored; logits (..., classes), labels (...)."""
    if isinstance(logits, Deferred):
        return logits.summed(lambda part, own: cross_entropy(part, own, criterion), labels, IGNORED)
    weights = None if criterion.weights is None else criterion.weights.to(logits.device, torch.float32)
    wide = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    weights = None if weights is None else weights.to(wide.dtype)
    options = {"ignore_index": IGNORED, "reduction": "sum", "label_smoothing": criterion.smoothing}
    return F.cross_entropy(wide, labels.flatten(), weight=weights, **options)


def counted(labels: Tensor, criterion: Criterion = PLAIN) -> Tensor:
    """The number of labels that are not ignored, or the sum of their weights."""
    kept = labels != IGNORED
    if criterion.weights is None:
        return kept.sum()
    return (criterion.weights.to(labels.device)[labels.clamp(min=0)] * kept).sum()
