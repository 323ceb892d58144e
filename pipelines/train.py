"""Tune a model as a spec says: spec -> trace -> plan -> rewrite -> tune -> adapter."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from pipelines.console import MAIN, Settings, Transforms, Without, console, failures, overrides

if TYPE_CHECKING:
    from rewriter import Plan


def train(
    spec: Annotated[
        Path, typer.Argument(help="The spec (YAML); <file>#<row> for one of its variants.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; made new.", show_default=False)],
    settings: Settings = None,
    without: Without = None,
    transforms: Transforms = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its newest checkpoint.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="First delete the run that is in --out.")] = False,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Folder of a run with the same rules: start from what it tuned.", show_default=False
        ),
    ] = None,
) -> None:
    """Tune a model and write the run folder: spec.yaml, plan.json, metrics.json, log.jsonl, checkpoints/, adapter/.

    Ctrl-C ends the step in progress, writes a checkpoint and stops; --resume goes on to the same result. Several
    processes, started by torchrun, share every batch.
    """
    with failures(out):
        from rewriter import Session, print_plan, print_summary
        from rewriter.folder import check_folder
        from rewriter.report.table import figure, kept

        session = Session(spec, *overrides(settings, without))
        if MAIN:
            check_folder(session.spec, out, resume, overwrite)
            cost = session.cost() if session.spec.limits.of_a_step else None
            print_plan(session.plan(), console, session.tokens, cost)
        say = lambda note: console.print(f"[yellow]note:[/] {escape(note)}")  # noqa: E731
        metrics = session.tune(out, resume, overwrite, say, start)
        if not MAIN:
            return
        name = session.spec.metric
        before = {
            f"{name} before": figure(value) for value in [metrics.get("before", {}).get(name)] if value is not None
        }
        facts = {**before, f"validation {name}": figure(metrics["validation"][name]), **kept(metrics, name)}
        command = " ".join(["python pipelines/export.py", shlex.quote(str(out)), *_files(session.plan())])
        print_summary("tuned", {**facts, "adapter": out / "adapter", "export it": command}, console)


def _files(planned: "Plan") -> list[str]:
    """Options that name the files which a plan's transforms come from."""
    found = {one.origin.package for rule in planned.rules for one, _ in rule.chain if one.origin and one.origin.is_file}
    return [f"--transforms {shlex.quote(name)}" for name in sorted(found)]


if __name__ == "__main__":
    typer.run(train)
