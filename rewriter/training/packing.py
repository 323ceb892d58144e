"""Packing: several rows in one sequence, none of which sees another.

A packed batch has no mask: models of transformers keep apart what `position_ids` that begin again keep apart.
"""

import inspect
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SpecError
from ..graph.ops import SDPA, aten
from ..graph.traced import Inputs, TracedModel
from ..tasks.base import IGNORED, padded_lists

PATH = ("train", "packing")
_ROWS, _TOKENS = 3, 32


class Packed(Sequence[list[Any]]):
    """Rows by the sequences that they are packed into, each a list of rows.

    Args:
        rows: encoded, each with `input_ids` of at most `size` tokens, and `labels`.
        lengths: their tokens.
        size: most tokens of a sequence.
    """

    def __init__(self, rows: Sequence[Any], lengths: Sequence[int], size: int):
        self.rows, self.bins = rows, bins(lengths, size)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> list[Any]:
        return [self.rows[i] for i in self.bins[index]]


def bins(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of rows, in sequences of at most `size` tokens: the longest first, each where it leaves the least room
    (best fit decreasing)."""
    found: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # What is left of a sequence, and its number; in order.
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, (lengths[row], -1))
        room, number = rooms.pop(place) if place < len(rooms) else (size, len(found))
        if number == len(found):
            found.append([])
        found[number].append(row)
        insort(rooms, (room - lengths[row], number))
    return found


def collate_packed(packs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Tensor]:
    """A batch of packed sequences: `input_ids`, `position_ids` and `labels`, (sequences, longest) int64.

    Positions begin again with each row; what fills a sequence up is one more row, of which nothing is learnt.
    """
    ids, labels, positions = [], [], []
    longest = max(sum(len(row["input_ids"]) for row in pack) for pack in packs)
    for pack in packs:
        ids.append([one for row in pack for one in row["input_ids"]])
        labels.append([one for row in pack for one in row["labels"]])
        filled = longest - len(ids[-1])
        positions.append([i for n in (*(len(row["input_ids"]) for row in pack), filled) for i in range(n)])
    batch = {"input_ids": padded_lists(ids, 0), "position_ids": torch.tensor(positions)}
    return {**batch, "labels": padded_lists(labels, IGNORED)}


def packed_inputs(model: nn.Module, batch: int = 3, length: int = 11) -> Inputs:
    """Examples of what a model reads of a packed batch.

    Raises:
        SpecError: the model takes no positions.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        said = f"{type(model).__name__} takes no position_ids, by which packed rows are kept apart"
        raise SpecError(f"{said}; group_by_length wastes little too", PATH)
    device = next(model.parameters()).device
    positions = torch.arange(length, device=device).repeat(batch, 1)
    kwargs = {"input_ids": torch.zeros_like(positions), "position_ids": positions}
    return Inputs(kwargs=kwargs, dynamic={name: {0: "batch", 1: "sequence"} for name in kwargs})


@torch.no_grad()
def check_packing(model: TracedModel, rows: Sequence[Mapping[str, Any]]) -> None:
    """Compare the first rows packed, in the train graph without its dropout, with them alone in the eval graph.

    Args:
        model: traced, its train graph with `packed_inputs`.
        rows: encoded.

    Raises:
        SpecError: the logits differ by more than rounding: the model does not keep packed rows apart.
    """
    some = [{key: rows[i][key][:_TOKENS] for key in ("input_ids", "labels")} for i in range(min(_ROWS, len(rows)))]
    batch, device = collate_packed([some, some]), next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
    found = _without_dropout(model).run("train", **inputs).logits[0].double()
    was, alone = model.training, []
    for row in some:
        ids = torch.tensor([row["input_ids"]], device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        alone.append(model.eval()(**inputs).logits[0].double())
    model.train(was)
    expected = torch.cat(alone)
    off = float((found[: len(expected)] - expected).abs().max())
    dtype = next(model.parameters()).dtype
    # Products of other shapes are rounded otherwise; a row that sees another is off by far more.
    most = 256 * torch.finfo(dtype).eps * max(float(expected.abs().max()), 1e-3)
    if not off <= most:
        said = f"the model does not keep packed rows apart: their logits differ by {off:.2g} from those of rows alone"
        raise SpecError(f"{said}; use group_by_length", PATH)


def _without_dropout(model: TracedModel) -> TracedModel:
    out = model.clone("train")
    graph = out.graphs["train"]
    for node in graph.find_nodes(op="call_function", target=aten.dropout.default):
        node.args = (node.args[0], 0.0, False)
    for node in graph.find_nodes(op="call_function", target=SDPA):
        if len(node.args) > 4:
            node.args = (*node.args[:4], 0.0, *node.args[5:])
        node.kwargs = {key: 0.0 if key == "dropout_p" else value for key, value in node.kwargs.items()}
    out.recompile()
    return out
