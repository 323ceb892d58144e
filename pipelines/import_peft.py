"""Make a run of an adapter that PEFT wrote."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pipelines.console import Settings, Transforms, console, failures


def import_peft(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder with adapter_config.json and adapter_model.safetensors.", show_default=False),
    ],
    base: Annotated[
        str,
        typer.Option(help="The base model: a hub id, a folder, or package://<package>/<folder>.", show_default=False),
    ],
    task: Annotated[
        str, typer.Option(help="What the model is for, as model.task of a spec: docs/tasks.md.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; made new.", show_default=False)],
    settings: Settings = None,
    transforms: Transforms = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="First delete the run that is in --out.")] = False,
) -> None:
    """Make a run of PEFT's adapter folder: its outputs are the same, and export, run and load_adapter take it.

    What the folder says and no transform computes is refused by its key. Labels are the base's; others are named by
    --set model.labels=[negative,positive].
    """
    with failures(out):
        from rewriter import print_summary
        from rewriter.exchange import import_peft

        with console.status(f"reading {folder}"):
            plan = import_peft(
                folder, out, base, task, settings or [], overwrite,
                lambda note: console.print(f"[yellow]note:[/] {escape(note)}"),
            )  # fmt: skip
        facts = {step: f"{count} sites" for step, count in Counter(site.transform for site in plan.sites).items()}
        facts |= {"tuned parameters": f"{plan.trainable_parameters:,}", "adapter": out / "adapter"}
        print_summary(f"imported {folder}", facts | {"export it": f"python pipelines/export.py {out}"}, console)


if __name__ == "__main__":
    typer.run(import_peft)
