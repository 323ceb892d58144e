"""Print a spec's plan, or what changes from one spec to another."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from pipelines.console import Settings, Transforms, Without, console, failures, overrides

if TYPE_CHECKING:
    from rewriter import Plan, Session
    from rewriter.report.table import Alike


def plan(
    spec: Annotated[
        Path, typer.Argument(help="The spec (YAML); <file>#<row> for one of its variants.", show_default=False)
    ],
    against: Annotated[
        Path | None, typer.Option(help="Another spec: print what changes from it to SPEC.", show_default=False)
    ] = None,
    settings: Settings = None,
    without: Without = None,
    transforms: Transforms = None,
) -> None:
    """Print the plan of a spec and what a step costs; with --against, what changes from another spec to this one.

    No weight is read. --set is for SPEC alone.
    """
    with failures():
        from rewriter import Session, print_plan

        new = Session(spec, *overrides(settings, without))
        if against is None:
            print_plan(new.plan(whole=True), console, new.tokens, new.cost())
            return
        for line in difference(Session(against), new):
            style = {"-": "red", "+": "green"}.get(line[:1], "")
            console.print(f"[{style}]{escape(line)}[/]" if style else escape(line), highlight=False, soft_wrap=True)


def difference(old: "Session", new: "Session") -> Iterator[str]:
    """Lines that say what changes: settings, then sites (- gone, + new), then totals."""
    before, after = (dict(_flat(one.spec.model_dump(mode="json", by_alias=True))) for one in (old, new))
    changed = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
    (plan_a, cost_a), (plan_b, cost_b) = ((one.plan(whole=True), one.cost()) for one in (old, new))
    yield "settings" if changed else "settings: the same"
    for key in changed:
        yield f"  {key}: {before.get(key, 'none')} -> {after.get(key, 'none')}"
    sites_a, sites_b = (_sites(one) for one in (plan_a, plan_b))
    yield "sites" if sites_a != sites_b else "sites: the same"
    for key in sorted({*sites_a, *sites_b}, key=lambda key: (key[0], key not in sites_a, key)):
        for sign, one, other in (("-", sites_a, sites_b), ("+", sites_b, sites_a)):
            if one.get(key) != other.get(key) and key in one:
                (label, transform, _, _, merges), (count, tuned) = key, one[key]
                stays = "" if merges else ", does not merge"
                yield f"{sign} {label}  {transform}  {count} sites, {tuned:,} tuned{stays}"
    yield "totals"
    totals = {
        "tuned parameters": (plan_a.trainable_parameters, plan_b.trainable_parameters),
        "head parameters": (plan_a.head_parameters, plan_b.head_parameters),
        "all parameters": (plan_a.total_parameters, plan_b.total_parameters),
        "bytes of activations": (cost_a.activations, cost_b.activations),
        "bytes of gradients and optimiser state": (cost_a.optimiser, cost_b.optimiser),
    }
    for name, (a, b) in totals.items():
        ratio = f" ({b / a - 1:+.1%})" if a else ""
        yield f"  {name}: " + (f"{a:,}, as before" if a == b else f"{a:,} -> {b:,}{ratio}")
    yield f"  FLOPs of a step over the frozen model's: {cost_a.overhead:+.2%} -> {cost_b.overhead:+.2%}"
    yield (
        f"  merges: {_yes(plan_a)} -> {_yes(plan_b)}" if plan_a.merges != plan_b.merges else f"  merges: {_yes(plan_b)}"
    )
    for name, one, other in (("no longer", plan_a, plan_b), ("now", plan_b, plan_a)):
        for warning in sorted(set(one.warnings) - set(other.warnings)):
            yield f"  {name} warned of: {warning}"


def _yes(plan: "Plan") -> str:
    return "yes" if plan.merges else "no"


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, one in value.items():
            yield from _flat(one, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(one, dict | list) for one in value):
        for i, one in enumerate(value):
            yield from _flat(one, f"{path}[{i}]")
    else:
        yield path, value


def _sites(plan: "Plan") -> "dict[Alike, tuple[int, int]]":
    """Of equal sites of several layers: how many, and their tuned parameters."""
    from rewriter.report.table import layers_together

    groups = layers_together(plan).items()
    return {key: (len(sites), sum(site.parameters for site in sites)) for key, sites in groups}


if __name__ == "__main__":
    typer.run(plan)
