"""List the passes over the graph, and for a spec what each changes."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from pipelines.console import Settings, Transforms, Without, console, failures, located, overrides
from rewriter import Spec, example_inputs, load_model, load_spec, plan, rewrite, trace
from rewriter.passes.base import Context
from rewriter.passes.manager import check_names, run
from rewriter.passes.pipelines import PASSES
from rewriter.trace import capture


def passes(
    spec: Annotated[
        Path | None, typer.Argument(help="A spec (YAML): count the nodes that each pass changes.", show_default=False)
    ] = None,
    settings: Settings = None,
    without: Without = None,
    transforms: Transforms = None,
) -> None:
    """List all passes in the order in which they run; for a spec, how many nodes each added, removed or altered.

    Passes that insert what the rules say can't be left out. The others can, by --without NAME or `train.passes: {off:
    [NAME]}` in a spec; those that change numerics run only if `train.passes: {on: [NAME]}` asks for them. No weight is
    read.
    """
    with failures():
        check_names(without or ())
        counts: dict[str, int] | None = None
        if spec is not None:
            loaded = load_spec(spec, overrides(settings, without))
            with located(loaded):
                counts = changes(loaded)
        table = Table(box=box.SIMPLE_HEAD, header_style="bold")
        for column in ("pass", "when", "numerics", "what it does", *(["nodes"] if counts is not None else [])):
            table.add_column(column, justify="right" if column == "nodes" else "left", overflow="fold")
        for one in PASSES:
            row = [one.name, ", ".join(one.stages), one.numerics, escape(one.doc)]
            table.add_row(*row, *([str(counts.get(one.name, "off"))] if counts is not None else []))
        console.print(table)


def changes(spec: Spec) -> dict[str, int]:
    """Pass -> how many nodes it changes in the graphs of a spec: train, eval, and the one that is exported."""
    chosen, changed = spec.train.passes, {}
    check_names(chosen.off, chosen.on)
    pretrained = load_model(spec, meta=True)
    inputs = example_inputs(pretrained.model, spec.model.task)
    traced = trace(pretrained.model, inputs, without=chosen.off, changed=changed)
    planned = plan(traced, spec.rules, pretrained.new, spec.strict)
    rewrite(traced, planned, without=chosen.off, also=chosen.on, changed=changed)
    exported = capture(pretrained.model, inputs).graph_module.graph
    run(exported, "export", Context("eval"), chosen.off, chosen.on, changed)
    return changed


if __name__ == "__main__":
    typer.run(passes)
