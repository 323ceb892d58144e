"""Check specs without loading a weight: the YAML, the rules against the traced model, the data where it is on disk."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pipelines.cli import Settings, console, failures, located
from pipelines.train import plan_of
from rewriter import Plan, Spec, SubspanError, load_rows, load_specs, print_plan


class Format(StrEnum):
    """How the plans are printed."""

    text = "text"
    json = "json"


def validate(
    specs: Annotated[list[Path], typer.Argument(help="Specs (YAML files), or folders of them.", show_default=False)],
    settings: Settings = None,
    format: Annotated[Format, typer.Option(help="text for people; json: a list of plans on stdout.")] = Format.text,
) -> None:
    """Check specs and print their plans; nothing is written.

    Exit status 0 if all are right, 1 with one line per wrong spec: file, line, column, and what to do.
    """
    wrong, plans = False, []
    for path in files(specs):
        try:
            with failures():
                for spec in load_specs(path, settings or []):
                    plan = check(spec)
                    plans.append({"file": str(path), "meta": spec.meta, "model": spec.model.name, **plan.to_dict()})
                    if format is Format.text:
                        show(path, spec, plan)
        except typer.Exit:
            wrong = True
    if format is Format.json:
        print(json.dumps(plans, indent=2, ensure_ascii=False))
    raise typer.Exit(int(wrong))


def files(paths: list[Path]) -> list[Path]:
    """Files as they are, folders as all YAML files in them; exits with one line for a folder without any."""
    found = []
    for path in paths:
        inside = sorted([*path.rglob("*.yaml"), *path.rglob("*.yml")]) if path.is_dir() else [path]
        with failures():
            if not inside:
                raise SubspanError(f"{path}: no .yaml file in this folder")
        found += inside
    return found


def check(spec: Spec) -> Plan:
    """The plan of a spec; raises SubspanError if it is wrong."""
    with located(spec):
        plan, pretrained = plan_of(spec)
        if spec.data and spec.data.files is not None:
            load_rows(spec, pretrained.labels)
    return plan


def show(path: Path, spec: Spec, plan: Plan) -> None:
    """Print one plan."""
    meta = "".join(f", {key} {value}" for key, value in spec.meta.items())
    console.print(f"[bold green]{escape(f'{path}{meta}')}[/] is valid", soft_wrap=True, highlight=False)
    print_plan(plan, console)


if __name__ == "__main__":
    typer.run(validate)
