"""Show the rows of a spec as a model reads them: what is learnt, what is not, how long they are, what is cut."""

import itertools
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.text import Text

from pipelines.console import Settings, Transforms, console, failures, overrides

BINS, WIDTH = 8, 40


class Part(StrEnum):
    """Which rows."""

    train = "train"
    validation = "validation"


def data(
    spec: Annotated[
        Path, typer.Argument(help="The spec (YAML); <file>#<row> for one of its variants.", show_default=False)
    ],
    rows: Annotated[int, typer.Option(min=0, help="How many to show.")] = 3,
    part: Annotated[Part, typer.Option(help="Of which part of the data.")] = Part.train,
    settings: Settings = None,
    transforms: Transforms = None,
) -> None:
    """Print the first rows of a spec as the model reads them, learnt tokens in green (where there are no colours, in
    ⟦brackets⟧), and how long all rows are.

    A line stands before each row. No weight is read.
    """
    with failures():
        from rewriter import Session, SubspanError

        session = Session(spec, *overrides(settings))
        (found, notes, processor), task = session.read(str(part)), session.spec.task
        parts = [(i, name, one) for i, row in enumerate(found) for name, one in task.parts(row).items()]
        if not parts:
            raise SubspanError("its rows are no tokens")
        before = [None, *(one for _, _, one in parts[:-1])]
        marks = [task.marks(one, earlier) for (_, _, one), earlier in zip(parts, before, strict=True)]
        colours = console.color_system is not None and not console.no_color
        for (number, name, one), learnt in zip(parts, marks, strict=True):
            if number == min(rows, len(found)):
                break
            others = {key: value for key, value in one.items() if not isinstance(value, list)}
            said = "".join(f", {key} {value}" for key, value in others.items())
            place = f"{number + 1} of {len(found)}{name and f', {name}'}"
            console.rule(f"{place}: {len(one['input_ids'])} tokens{said}", style="dim")
            console.print(written(processor, one, learnt, colours), soft_wrap=True)
        lengths = np.array([len(one["input_ids"]) for _, _, one in parts])
        learnt = sum(task.learnt(row) for row in found) if any(map(any, marks)) else 0
        of_them = f", {learnt:,} of them learnt" if learnt else ""
        console.print(f"{len(lengths)} rows, {lengths.sum():,} tokens{of_them}", highlight=False)
        for line in histogram(lengths):
            console.print(line, highlight=False)
        for note in notes:
            console.print(note, highlight=False)


def written(processor: Any, row: dict[str, Any], marks: Sequence[bool], colours: bool) -> Text:
    """A row's tokens as a text: learnt ones in green, or in brackets where there are no colours; others dim."""
    text = Text()
    for learnt, group in itertools.groupby(zip(row["input_ids"], marks, strict=True), key=lambda one: one[1]):
        part = processor.decode([token for token, _ in group])
        text.append(part if colours or not learnt else f"⟦{part}⟧", style="green" if learnt else "dim")
    return text


def histogram(lengths: np.ndarray) -> list[str]:
    """Lines of a histogram of lengths, in tokens."""
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, BINS + 1).astype(int))
    counts = np.histogram(lengths, edges)[0]
    lines = []
    for first, stop, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * round(WIDTH * count / counts.max())
        lines.append(f"{first:>6} to {stop - 1:<6} {count:>8,}  {bar}")
    return lines


if __name__ == "__main__":
    typer.run(data)
