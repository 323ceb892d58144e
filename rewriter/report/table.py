"""What a person looks at: the plan as a table, and the end of a run."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..files import read_json
from ..plan import Plan, Site
from ..plan.cost import StepCost, site_cost
from ..spec import Spec

_NUMBER = re.compile(r"(?<=\.)\d+(?=[.\[])")
Alike = tuple[str, str, tuple[int, ...], bool, bool]


def any_layer(label: str) -> str:
    """A site's label with * for the number of its layer."""
    return _NUMBER.sub("*", label, count=1)


def layers_together(plan: Plan) -> dict[Alike, list[Site]]:
    """Equal sites of several layers together: (label with * for the layer, transform, shape, head, merges) -> sites."""
    groups: dict[Alike, list[Site]] = {}
    for site in plan.sites:
        key = any_layer(site.label), site.transform, site.shape, site.head, site.merges
        groups.setdefault(key, []).append(site)
    return groups


def print_plan(plan: Plan, console: Console, tokens: int, step: StepCost | None = None) -> None:
    """The sites, equal ones of several layers in one row, the totals, notes and warnings.

    Args:
        tokens: rows that an op reads per step.
        step: cost of a step, if it is known.
    """
    table = Table(title="plan", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for column, justify in (
        ("site", "left"),
        ("transform", "left"),
        ("n x m", "right"),
        ("sites", "right"),
        ("tuned", "right"),
        ("class", "left"),
        ("rank of change", "right"),
        ("forward", "right"),
        ("backward", "right"),
    ):
        table.add_column(column, justify=justify, overflow="fold")
    for (label, transform, shape, head, merges), sites in layers_together(plan).items():
        mark = "  (head)" if head else "" if merges else "  (does not merge)"
        size = " x ".join(map(str, shape))
        cost = site_cost(sites[0], tokens)
        tuned = f"{sum(site.parameters for site in sites):,}"
        row = [escape(label) + mark, escape(transform), size, str(len(sites)), tuned, sites[0].classes]
        table.add_row(*row, "" if cost.rank is None else f"{cost.rank:,}", _added(cost.forward), _added(cost.backward))
    console.print(table)
    rules = plan.by_rule()
    for rule, sites in rules.items() if len(rules) > 1 else []:
        tuned = sum(site.parameters for site in sites)
        console.print(f"rules[{rule}]: {len(sites)} sites, {tuned:,} tuned parameters", highlight=False, markup=False)
    console.print(
        f"{plan.trainable_parameters:,} tuned parameters, {plan.share:.3f} thousandths of {plan.total_parameters:,}; "
        f"{plan.head_parameters:,} in new heads; {plan.weight_bytes / 1e6:,.1f} MB of weights",
        highlight=False,
    )
    if step:
        console.print(
            f"a step: {step.activations / 1e6:,.1f} MB of activations, {step.optimiser / 1e6:,.1f} MB of gradients and "
            f"optimiser state, {_added(step.overhead)} FLOPs over the frozen model's"
            + (
                f"{f', in each of {step.processes} processes' * (step.processes > 1)} beside "
                f"{step.weights / 1e6:,.1f} MB of weights" * (step.processes > 1 or step.offloaded > 0)
            )
            + (f"; {step.layers} layers are computed again in the backward, to meet the limit" if step.layers else "")
            + (f"; weights of {step.offloaded} of the layers stay in the CPU's memory" if step.offloaded else ""),
            highlight=False,
        )
    for note in plan.notes:
        console.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)


def _added(share: float | None) -> str:
    return "" if share is None else f"{share:+.2%}"


def print_summary(title: str, facts: Mapping[str, Any], console: Console) -> None:
    """Facts, a line each."""
    console.print(f"[bold]{escape(title)}[/]")
    width = max(map(len, facts))
    for name, value in facts.items():
        console.print(f"  {name:<{width}}  {escape(str(value))}", highlight=False, soft_wrap=True)


def figure(value: float | None) -> str:
    """A metric, with four decimals."""
    return "no number" if value is None else f"{value:.4f}"


def tuned_of(plan: Mapping[str, Any]) -> str:
    """How much is tuned, by plan.json."""
    share = f"{plan['trainable_thousandths']:.3f} thousandths of {plan['total_parameters']:,}"
    return f"{plan['trainable_parameters']:,} ({share})"


Rows = tuple[list[str], list[list[str]]]


def fitted_table(report: Mapping[str, Any]) -> Rows:
    """Heads and rows of what fit.json says of each method, the nearest first."""
    rows = [
        [
            one["method"], ", ".join(f"{key}={value}" for key, value in one["options"].items()),
            f"{one['parameters']:,}", f"{one['error']:.4f}", figure(one["value"]) if "value" in one else "",
        ]
        for one in sorted(report["methods"], key=lambda one: one["error"])
    ]  # fmt: skip
    return ["method", "options", "parameters", "error", report.get("metric", "")], rows


def combined_table(report: Mapping[str, Any]) -> Rows:
    """Heads and rows of what combine.json says of each run."""
    rows = [
        [
            one["run"], f"{one['weight']:g}", one.get("metric", "no data"),
            *(figure(one[key]) if key in one else "" for key in ("alone", "combined")),
        ]
        for one in report["runs"]
    ]  # fmt: skip
    return ["run", "weight", "metric", "alone", "combined"], rows


def kept(metrics: Mapping[str, Any], metric: str) -> dict[str, str]:
    """Which state of a run is shipped, where that needs saying: another one than the last, or the last though an
    earlier one was better."""
    steps, found = metrics["train"]["steps"], metrics.get("evaluations", {})
    chosen, best, value = (found.get(name) for name in ("kept", "best", "value"))
    if best is None or best == chosen == steps or (chosen == steps and value == metrics["validation"][metric]):
        return {}
    if chosen != steps:
        return {"kept": f"the state of step {chosen} of {steps}, the best that was evaluated ({figure(value)})"}
    return {"kept": f"the last state; that of step {best} was better ({figure(value)}): train.keep: best ships it"}


def _again(report: Mapping[str, Any], spec: Spec) -> str:
    said = f"{report['max_abs_diff']:.2e} from the tuned model"
    if report["metrics"]:
        said += f", {spec.compared} {figure(report['metrics'][spec.compared])}"
    return said + (f", {report['agreement']:.1%} of its decisions" if report["agreement"] is not None else "")


def _allowed(report: Mapping[str, Any]) -> str:
    if report["atol"] is not None:
        return f"atol {report['atol']:g}"
    return f"the tuned model's own rounding is {report['rounding']:.2e}"


def _compared(report: Mapping[str, Any]) -> str:
    rows = report["rows"]
    if not rows["validation"]:
        return f"{rows['random']} random rows; not on validation rows: {rows['why']}"
    said = f"{rows['random']} random rows, {rows['compared']} of {rows['validation']} validation rows"
    shares = [share for share in report["agreement"].values() if share is not None]
    return f"{said}; {min(shares):.1%} of all decisions are the tuned run's" if shares else said


def converted(report: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter that was written for others came to, for `print_summary`.

    Args:
        report: from `export.adapter.ship_adapter`.
    """
    facts: dict[str, Any] = {}
    if sites := report.get("sites"):
        ranks = [one["r"] for one in sites.values()]
        exact = sum(one["exact"] for one in sites.values())
        facts["changes"] = f"{len(sites)} weights, rank {min(ranks)} to {max(ranks)}, {exact} of them exact"
        facts["largest error"] = f"{max(one['error'] for one in sites.values()):.2e} of a layer's change"
        if not report["calibrated"]:
            facts["largest error"] += ", of the weights: there are no training rows to see the layers' inputs on"
    if "metric" in report:
        facts[f"validation {report['metric']}"] = f"{figure(report['before'])} as tuned, {figure(report['after'])} now"
    return facts | {"largest difference": f"{report['largest']:.2e} (read back)", "folder": report["folder"]}


def shipped(spec: Spec, run: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """What an exported run came to, for `print_summary`.

    Args:
        run: its folder.
        report: the content of verify.json.
    """
    plan = read_json(run / "plan.json")
    metrics = read_json(run / "metrics.json") if spec.data else {}  # An imported run has none.
    heads = f"{plan['head_parameters']:,} in new heads"
    facts = {
        **({f"validation {spec.metric}": figure(metrics["validation"][spec.metric])} if metrics else {}),
        **(kept(metrics, spec.metric) if "train" in metrics else {}),
        "tuned parameters": f"{tuned_of(plan)}, and {heads}",
        "largest difference": f"{report['max_abs_diff']:.2e} ({_allowed(report)}): {', '.join(report['stages'])}",
        "compared on": _compared(report),
    }
    if again := report.get("requantised"):
        facts[f"in {again['method']} again"] = _again(again, spec)
    facts |= {name: run / name for name in ("adapter", "merged", "onnx") if (run / name).exists()}
    if spec.export.checkpoint and not plan["merges"]:
        facts["merged"] = "not written: what can't merge is in the ONNX graph alone"
    return facts
