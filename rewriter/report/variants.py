"""The table of a run's ONNX files."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..export.listing import heads_of, listing, where
from ..files import read_json


def print_variants(run: Path, console: Console) -> None:
    """Print export.json: every file with its size, how it does beside the tuned run, and its latency."""
    found = read_json(run / "export.json")
    shapes, files, others = listing(found)
    columns = ("holds", "MB", "metric", "same decisions", "largest difference", *shapes)
    table = Table("variant", *heads_of(found, columns, shapes))
    for row in files:
        name = f"[bold]{row['name']}[/bold] -> model.onnx" if row["name"] == found["chosen"] else row["name"]
        table.add_row(name, *(row[column] for column in columns))
    for row in others:
        table.add_row(row["name"], *(row.get(column, "") for column in columns))
    console.print(table)
    if (said := where(found)) is not None:
        console.print(f"on {said}", highlight=False)
