"""Listing: the entries of export.json as text, for every table of them."""

from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {"eager": "PyTorch", "compile": "torch.compile", "products": "matrix products alone"}


def listing(found: Mapping[str, Any]) -> tuple[list[str], list[dict[str, str]], list[dict[str, str]]]:
    """What export.json says, as cells.

    Returns:
        Names of the batches that were timed; a row of cells for each file, by column: `name`, `file`, `holds`, `MB`,
        `metric`, `same decisions`, `largest difference` and the batches; and one for each run beside them: `name` and
        the batches.
    """
    files, others = found["variants"], {name: times for name, times in found["beside"].items() if times}
    timed = [*(one["latency_ms"] for one in files), *others.values()]
    shapes = list(dict.fromkeys(shape for times in timed for shape in times))
    times_of = lambda times: {shape: _number(times.get(shape), ".2f") for shape in shapes}  # noqa: E731
    rows = [
        {
            "name": one["name"],
            "file": one["file"] or "",
            "holds": "yes" if one["holds"] else f"no: {one['reason']}",
            "MB": _number(one["bytes"] and one["bytes"] / 1e6, ".1f"),
            "metric": _number(one["metric"], ".4f"),
            "same decisions": _number(one["agreement"], ".2%"),
            "largest difference": _number(one["max_abs_diff"], ".1e"),
            **times_of(one["latency_ms"]),
        }
        for one in files
    ]
    return shapes, rows, [{"name": called(name), **times_of(times)} for name, times in others.items()]


def table_of(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]], int | None]:
    """What export.json says as a table: heads, rows, and which row is shipped."""
    shapes, files, others = listing(found)
    columns = ("name", "holds", "MB", "metric", "same decisions", "largest difference", *shapes)
    rows = [[row.get(column, "") for column in columns] for row in (*files, *others)]
    shipped = next((i for i, row in enumerate(files) if row["name"] == found["chosen"]), None)
    return ["variant", *heads_of(found, columns[1:], shapes)], rows, shipped


def heads_of(found: Mapping[str, Any], columns: Sequence[str], shapes: Sequence[str]) -> list[str]:
    """What columns of a listing are called: the metric by its name, batches with the unit of their times."""
    names = {"metric": found.get("metric", "metric")} | {shape: f"{shape}, ms" for shape in shapes}
    return [names.get(column, column) for column in columns]


def called(name: str) -> str:
    """What a run beside the files is called: `eager-float16` -> `PyTorch, float16`."""
    what, _, dtype = name.partition("-")
    return f"{NAMES[what]}, {dtype}" if dtype else NAMES[what]


def where(found: Mapping[str, Any]) -> str | None:
    """What export.json says of the machine that times were taken on; None where nothing was timed."""
    one = found["machine"]
    if one is None:
        return None
    load = "" if one["load"] is None else f", load {one['load']}"
    gpu = f"{one['gpu']}, " if "gpu" in one and found["target"] == "cuda" else ""
    return f"{gpu}{one['processor']}, {one['threads']} threads{load}; medians in turn; 8x128 is 8 rows of 128 tokens"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
