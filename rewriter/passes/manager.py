"""The manager: runs the passes of a stage, less what is switched off, and counts what each changed."""

import difflib
from collections.abc import Collection

from torch import fx

from ..errors import SpecError
from .base import Context, Pass, Stage
from .pipelines import PASSES


def run(
    graph: fx.Graph,
    stage: Stage,
    context: Context,
    without: Collection[str] = (),
    also: Collection[str] = (),
    changed: dict[str, int] | None = None,
) -> fx.Graph:
    """The graph after all passes of a stage.

    Args:
        graph: changed in place.
        without: names of passes to leave out.
        also: names of passes that change numerics, to run all the same.
        changed: name -> how many nodes a pass added, removed or altered, counted up.

    Raises:
        SpecError: as `check_names`.
    """
    check_names(without, also)
    for one in PASSES:
        if stage not in one.stages or one.name in without or (one.numerics == "changing" and one.name not in also):
            continue
        before = _described(graph) if changed is not None else {}
        graph = one.function(graph, context)
        if changed is not None:
            changed[one.name] = changed.get(one.name, 0) + _difference(before, _described(graph))
    return graph


def check_names(without: Collection[str] = (), also: Collection[str] = ()) -> None:
    """Refuse names that are no passes, and what can't be left out or need not be asked for.

    Raises:
        SpecError: at `train.passes`, with the nearest name.
    """
    by_name: dict[str, Pass] = {one.name: one for one in PASSES}
    for key, names in (("off", without), ("on", also)):
        for name in names:
            path = ("train", "passes", key)
            if name not in by_name:
                near = difflib.get_close_matches(name, by_name, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(by_name)}"
                raise SpecError(f"no pass {name!r}; {hint}", path)
            if key == "off" and by_name[name].numerics == "inserting":
                raise SpecError(f"{name} inserts what the rules say: it can't be left out", path)
            if key == "on" and by_name[name].numerics != "changing":
                raise SpecError(f"{name} does not change numerics, so it runs unless it is off", path)


def _described(graph: fx.Graph) -> dict[fx.Node, str]:
    return {node: f"{node.op} {node.target} {node.args} {node.kwargs}" for node in graph.nodes}


def _difference(before: dict[fx.Node, str], after: dict[fx.Node, str]) -> int:
    kept = before.keys() & after.keys()
    altered = sum(before[node] != after[node] for node in kept)
    return altered + len(before) - len(kept) + len(after) - len(kept)
