"""The table of a run's ONNX files."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..export.listing import table_of, where
from ..files import read_json


def print_variants(run: Path, console: Console) -> None:
    """Print export.json: every file with its size, how it does beside the tuned run, and its latency."""
    found = read_json(run / "export.json")
    heads, rows, shipped = table_of(found)
    table = Table(*heads)
    for i, (name, *cells) in enumerate(rows):
        table.add_row(f"[bold]{name}[/bold] -> model.onnx" if i == shipped else name, *cells)
    console.print(table)
    if (said := where(found)) is not None:
        console.print(f"on {said}", highlight=False)
