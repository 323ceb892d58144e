"""What a person looks at: the plan as a table, and the end of a run."""

import re
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .plan import Plan

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def print_plan(plan: Plan, console: Console) -> None:
    """The sites, equal ones of several layers in one row, the totals, notes and warnings."""
    groups: dict[tuple, list] = {}
    for site in plan.sites:
        groups.setdefault(
            (_NUMBER.sub("*", site.label, count=1), site.transform, site.shape, site.head, site.merges), []
        ).append(site)
    table = Table(title="plan", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for column, justify in (
        ("site", "left"),
        ("transform", "left"),
        ("n x m", "right"),
        ("sites", "right"),
        ("tuned", "right"),
    ):
        table.add_column(column, justify=justify, overflow="fold")
    for (label, transform, shape, head, merges), sites in groups.items():
        mark = "  (head)" if head else "" if merges else "  (does not merge)"
        size = " x ".join(map(str, shape))
        table.add_row(
            escape(label) + mark, escape(transform), size, str(len(sites)), f"{sum(s.parameters for s in sites):,}"
        )
    console.print(table)
    console.print(
        f"{plan.trainable_parameters:,} tuned parameters, {plan.share:.3f} thousandths of {plan.total_parameters:,}; "
        f"{plan.head_parameters:,} in new heads",
        highlight=False,
    )
    for note in plan.notes:
        console.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)


def print_summary(title: str, facts: Mapping[str, Any], console: Console) -> None:
    """Facts, a line each."""
    console.print(f"[bold]{escape(title)}[/]")
    width = max(map(len, facts))
    for name, value in facts.items():
        console.print(f"  {name:<{width}}  {escape(str(value))}", highlight=False, soft_wrap=True)
