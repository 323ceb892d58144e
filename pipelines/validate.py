"""Check specs without loading a weight: the YAML, the plan against the model's shapes, every pass on its graph, and a
small copy of the whole run."""

import json
import os
import sys
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from pipelines.console import Settings, Transforms, Without, console, overrides
from pipelines.findings import Finding, findings, to_github, to_sarif, to_text
from rewriter.errors import SubspanError, UnreachableError, printable, reason

if TYPE_CHECKING:
    from rewriter import Plan, Session, Spec
    from rewriter.plan.cost import StepCost


class Level(StrEnum):
    """How deep to check."""

    schema = "schema"
    plan = "plan"
    trace = "trace"
    smoke = "smoke"


class Consumer(StrEnum):
    """What reads an adapter without merging it."""

    peft = "peft"
    vllm = "vllm"
    genai = "genai"
    olive = "olive"


class Format(StrEnum):
    """How the findings are printed."""

    text = "text"
    json = "json"
    github = "github"
    sarif = "sarif"


def validate(
    specs: Annotated[list[Path], typer.Argument(help="Specs (YAML files), or folders of them.", show_default=False)],
    settings: Settings = None,
    without: Without = None,
    transforms: Transforms = None,
    level: Annotated[
        Level,
        typer.Option(
            help="schema: the YAML alone, no model, no network. plan: targets, shapes, counts and limits against the "
            "model's shapes, and the data where it is on disk. trace: also the real torch.export and every pass. "
            "smoke: also two steps, merge, export and comparison of "
            "a random model of the same config with two layers, on real rows."
        ),
    ] = Level.plan,
    format: Annotated[
        Format,
        typer.Option(
            help="text for people; json: the plans and mistakes; github: annotations of a workflow; sarif: a SARIF "
            "2.1.0 log for code scanning. All but text go to stdout, mistakes as lines to stderr."
        ),
    ] = Format.text,
    served: Annotated[
        Consumer | None,
        typer.Option(
            "--for",
            help="Also refuse what this one could not serve as an adapter; what merges, anyone serves merged.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check specs; no weight is read, and nothing stays written beside them.

    Exit status 0 if all are right; 1 if one is wrong, with a line for each mistake: file, line, column, and what to do;
    2 if one could not be checked, for example because its model can't be reached.
    """
    results = check_all(specs, overrides(settings, without), level, format, served)
    found = [finding for result in results for finding in result["findings"]]
    if format is Format.json:
        print(json.dumps([_json(result) for result in results], indent=2, ensure_ascii=False))
    elif format is Format.sarif:
        print(json.dumps(to_sarif(found), indent=2, ensure_ascii=False))
    elif format is Format.github:
        print("".join(f"{to_github(finding)}\n" for finding in found), end="")
    kinds = {finding.kind for finding in found}
    raise typer.Exit(1 if "spec" in kinds else 2 if "unchecked" in kinds else 0)


def check_all(
    paths: list[Path], settings: list[str], level: Level, format: Format, served: Consumer | None = None
) -> list[dict[str, Any]]:
    """What there is to say of every spec of every file, in order; mistakes are printed as they are found.

    Specs of one model are checked one after the other, so that it is traced once.
    """
    from rewriter import Session, load_specs
    from rewriter.passes.manager import check_names
    from rewriter.spec import located

    results: list[dict[str, Any]] = []
    for file in files(paths):
        try:
            if file.is_dir():
                raise UnreachableError(f"{file}: no .yaml file in this folder")
            loaded = load_specs(file, settings)
        except Exception as error:
            results.append({"file": str(file), "session": None, "plan": None, "findings": _findings(error, file)})
            continue
        made = [Session(spec) for spec in loaded]
        results += [{"file": str(file), "session": session, "plan": None, "findings": []} for session in made]
    before = None
    for result in sorted((one for one in results if one["session"]), key=lambda one: one["session"].model_key):
        spec = result["session"].spec
        try:
            with located(spec):
                check_names(spec.train.passes.off, spec.train.passes.on)
            if level is Level.schema:
                continue
            before = result["session"] = Session(spec, like=before)
            result["plan"], result["step"] = check(before, level, served)
            result["findings"] = _warnings(spec, result["plan"], result["file"])
        except Exception as error:
            result["findings"] = _findings(error, Path(result["file"]))
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    for result in results:
        for finding in result["findings"]:
            if format is Format.text:
                word, _, rest = to_text(finding).partition(":")
                errors.print(f"[{'yellow' if word == 'warning' else 'bold red'}]{word}:[/]{escape(rest)}")
            elif finding.kind != "warning":
                print(f"error: {finding}", file=sys.stderr)
        if format is Format.text and not any(one.kind != "warning" for one in result["findings"]):
            show(result, served)
    return results


def files(paths: list[Path]) -> list[Path]:
    """Files as they are, folders as all YAML files in them; a folder without any as itself."""
    found = []
    for path in paths:
        inside = sorted([*path.rglob("*.yaml"), *path.rglob("*.yml")]) if path.is_dir() else []
        found += inside or [path]
    return found


def check(session: "Session", level: Level, served: Consumer | None = None) -> "tuple[Plan, StepCost | None]":
    """The plan of a spec, with what there is to say of its rows, and the cost of a step where the level or a limit asks
    for it.

    Raises:
        SubspanError: with the place of each mistake.
    """
    whole = level is Level.trace or session.spec.limits.of_a_step
    plan = session.plan(whole)
    plan = replace(plan, notes=(*plan.notes, *session.check_data()))
    if served is not None:
        from rewriter.adapters.from_peft import TASK_TYPES
        from rewriter.adapters.to_peft import check_served
        from rewriter.spec import located

        with located(session.spec):
            plan = replace(
                plan,
                notes=(
                    *plan.notes,
                    *check_served(session.shapes()[0], plan, str(served), TASK_TYPES.get(session.spec.task.auto)),
                ),
            )
    if level is Level.smoke:
        session.smoke()
    return plan, session.cost() if whole else None


def _findings(error: Exception, file: Path) -> list[Finding]:
    if isinstance(error, SubspanError):
        return findings(error, str(file))
    if os.environ.get("SUBSPAN_TRACEBACK"):
        raise error
    if isinstance(error, OSError):
        message = f"{file}: can't read it: {error.strerror or error}"
    else:
        message = f"{file}: unexpected {type(error).__name__}: {reason(error)} (set SUBSPAN_TRACEBACK=1 to see where)"
    return [Finding("unchecked", str(file), 1, 1, 1, " ".join(message.split()), placed=False)]


def _warnings(spec: "Spec", plan: "Plan", file: str) -> list[Finding]:
    from rewriter.spec import warned

    placed = ((warning, findings(spec.locate(warned(warning)), file)) for warning in plan.warnings)
    return [replace(finding, kind="warning", message=warning) for warning, found in placed for finding in found]


def _json(result: dict[str, Any]) -> dict[str, Any]:
    from rewriter.plan.cost import site_cost

    session, plan, found = result["session"], result["plan"], result["findings"]
    out: dict[str, Any] = {"file": result["file"], "valid": all(finding.kind == "warning" for finding in found)}
    if session:
        out |= {"meta": session.spec.meta, "model": session.spec.model.name}
    if plan:
        out |= plan.to_dict()
        for site, described in zip(plan.sites, out["sites"], strict=True):
            described |= asdict(site_cost(site, session.tokens))
        totals = {rule: sum(site.parameters for site in sites) for rule, sites in plan.by_rule().items()}
        out["rules"] = [{"rule": rule, "parameters": total} for rule, total in totals.items()]
        out["step"] = asdict(result["step"]) if result["step"] else None
    return out | {"findings": [finding.to_dict() for finding in found]}


def show(result: dict[str, Any], served: Consumer | None = None) -> None:
    """Print one plan, and what could serve its adapter."""
    from rewriter import print_plan

    session = result["session"]
    meta = "".join(f", {key} {value}" for key, value in session.spec.meta.items())
    label = escape(printable(f"{result['file']}{meta}"))
    said = f", and {served.value} can serve its adapter" if served and result["plan"] else ""
    console.print(f"[bold green]{label}[/] is valid{said}", soft_wrap=True, highlight=False)
    if result["plan"]:
        print_plan(result["plan"], console, session.tokens, result["step"])


if __name__ == "__main__":
    typer.run(validate)
