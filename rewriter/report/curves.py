"""Figures of a run, as SVG that stands in a page."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .subspaces import Subspace

_STYLE = {"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
_SIZE = (4.6, 2.5)  # inches


def curves(log: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Name -> figure of every number in a log against the step, those of evaluations first; the loss of training and of
    evaluations in one.

    Args:
        log: entries of log.jsonl; None is no number.
    """
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for entry in log:
        for key, value in entry.items():
            if key in ("step", "epoch") or not (value is None or isinstance(value, int | float)):
                continue
            evaluated = key.startswith("eval_")
            name = key.removeprefix("eval_")
            points = found.setdefault(name, {}).setdefault("validation" if evaluated else "training", [])
            points.append((entry["step"], float("nan") if value is None else float(value)))
    first = sorted(found, key=lambda name: -len(found[name]) if "validation" in found[name] else 0)
    return {name: _curve(name, found[name]) for name in first}


def _curve(name: str, lines: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(_SIZE, layout="constrained")
        axes = figure.add_subplot()
        for colour, (label, points) in enumerate(sorted(lines.items())):
            few = len(points) <= 60
            axes.plot(*zip(*points, strict=True), f"C{colour}", label=label, marker="." if few else "", linewidth=1.2)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(frameon=False)
        return _svg(figure)


def angles(found: Sequence[Subspace]) -> str:
    """Angles, share outside and norm of every weight, in the plan's order; a colour for the weights of one name."""
    names = list(dict.fromkeys(map(_name, found)))
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": "angles"}):
        figure = Figure((7.2, 6.4), layout="constrained")
        top, middle, bottom = figure.subplots(3, sharex=True)
        for colour, name in enumerate(names):
            own = [(i, one) for i, one in enumerate(found) if _name(one) == name]
            places, mark = [i for i, _ in own], {"color": f"C{colour % 10}", "marker": "o", "s": 14}
            largest = [one.angles[0] for _, one in own]
            top.vlines(places, [one.angles[len(one.angles) // 2] for _, one in own], largest, f"C{colour % 10}", lw=1)
            top.scatter(places, largest, label=name, **mark)
            middle.scatter(places, [100 * one.outside for _, one in own], **mark)
            bottom.scatter(places, [100 * one.norm for _, one in own], **mark)
        middle.plot([100 * one.chance for one in found], color="#777", linewidth=0.8, linestyle="--")
        top.set_ylabel("largest angle to\nthe median, degrees")
        middle.set_ylabel("outside span W, %\n(dashes: by chance)")
        bottom.set_ylabel("norm of the change,\n% of the weight's")
        bottom.set_xlabel("weights, in the plan's order")
        for axes in (top, middle, bottom):
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        figure.legend(*top.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False, fontsize=8)
        return _svg(figure)


def _name(one: Subspace) -> str:
    """A weight's name without the number of its layer, its last three parts."""
    return ".".join(part for part in one.label.split(".") if not part.isdigit() and part != "weight").split(".", 1)[-1]


def fits(methods: Sequence[Mapping[str, Any]]) -> str:
    """Error against parameters of the methods in fit.json."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": "fits"}):
        figure = Figure((7.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for i, name in enumerate(dict.fromkeys(one["method"] for one in methods)):
            own = sorted((one["parameters"], one["error"]) for one in methods if one["method"] == name)
            axes.plot(*zip(*own, strict=True), marker="os^vD"[i // 10 % 5], color=f"C{i % 10}", label=name, linewidth=1)
        axes.set_xscale("log")
        axes.set_xlabel("parameters")
        axes.set_ylabel("error")
        axes.grid(alpha=0.3)
        figure.legend(loc="outside upper left", ncols=5, frameon=False, fontsize=8)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    """The figure as an element of a page, as wide as there is room."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text[text.index("<svg") :], count=1)
