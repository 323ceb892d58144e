"""The table of a run's ONNX files."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..files import read_json


def print_variants(run: Path, console: Console) -> None:
    """Print export.json: every file with its size, how it does beside the tuned run, and its latency."""
    found = read_json(run / "export.json")
    shapes = list(dict.fromkeys(shape for one in found["variants"] for shape in one["latency_ms"]))
    heads = ("variant", "holds", "MB", "metric", "same decisions", "largest difference")
    table = Table(*heads, *(f"{shape}, ms" for shape in shapes))
    for one in found["variants"]:
        name = f"[bold]{one['name']}[/bold] -> model.onnx" if one["name"] == found["chosen"] else one["name"]
        holds = "yes" if one["holds"] else f"no: {one['reason']}"
        size = "" if one["bytes"] is None else f"{one['bytes'] / 1e6:.1f}"
        table.add_row(
            name,
            holds,
            size,
            _number(one["metric"], ".4f"),
            _number(one["agreement"], ".2%"),
            _number(one["max_abs_diff"], ".1e"),
            *(_number(one["latency_ms"].get(shape), ".2f") for shape in shapes),
        )
    for name, times in found["beside"].items():
        if times:
            table.add_row(beside(name), *[""] * 5, *(_number(times.get(shape), ".2f") for shape in shapes))
    console.print(table)


def beside(name: str) -> str:
    """What a run beside the files is called: `eager-float16` -> `PyTorch, float16`."""
    names = {"eager": "PyTorch", "compile": "torch.compile", "products": "matrix products alone"}
    what, _, dtype = name.partition("-")
    return f"{names[what]}, {dtype}" if dtype else names[what]


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
