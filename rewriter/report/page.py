"""A run as one page that needs nothing else: curves, plan, rewrite, subspaces, comparisons and files."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from ..errors import SubspanError
from ..export.listing import table_of, where
from ..files import read_json
from ..spec import Spec
from ..training.reports import LOG
from .curves import angles, curves, fits
from .subspaces import ENERGY, Subspace
from .table import any_layer, combined_table, figure, fitted_table, tuned_of


@dataclass(frozen=True)
class Cells:
    """A table; `numbers` are the columns that are figures."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Collection[int] = ()


@dataclass(frozen=True)
class Part:
    """A section of the page; `figures` and `drawing` are SVG."""

    id: str
    title: str
    note: str = ""
    figures: Sequence[tuple[str, str]] = ()
    drawing: str = ""
    texts: Sequence[str] = field(default_factory=list)
    table: Cells | None = None


def page(
    spec: Spec,
    run: Path,
    running: bool = False,
    drawing: str = "",
    spanned: Sequence[Subspace] = (),
    notes: Mapping[str, str] | None = None,
) -> str:
    """The page of a run, HTML, of what its folder holds now.

    Args:
        running: whether a command still works in the folder; the page then loads itself anew.
        drawing: SVG of the rewrite.
        spanned: from `subspaces`.
        notes: `drawing`, `spanned` -> why it is not there.
    """
    notes, log = notes or {}, _log(run)
    done = _read(run, "metrics.json")
    parts = [
        *_curves(log),
        *_samples(log),
        *_plan(run),
        *_fitted(run),
        *_combined(run),
        *_rewrite(drawing, notes.get("drawing", "")),
        *_subspaces(spanned, notes.get("spanned", "")),
        *_compared(run),
        *_files(run),
    ]
    state = _state(log, running, bool(done) or (not log and (run / "adapter").is_dir()))
    environment = Environment(loader=PackageLoader("rewriter", "report"), autoescape=True, trim_blocks=True)
    return environment.get_template("page.html").render(
        title=run.resolve().name, state=state, running=running, facts=_facts(spec, run, done), parts=parts
    )


def _read(run: Path, name: str) -> dict[str, Any]:
    return read_json(run / name) if (run / name).is_file() else {}


def _log(run: Path) -> list[dict[str, Any]]:
    """Entries of the log; its last line may be half written.

    Raises:
        SubspanError: another line is no entry.
    """
    lines = (run / LOG).read_bytes().splitlines(keepends=True) if (run / LOG).is_file() else []
    entries = []
    for number, line in enumerate((line for line in lines if line.endswith(b"\n")), 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not {"step", "epoch"} <= entry.keys():
                raise ValueError("no step")
        except ValueError as error:
            raise SubspanError(f"{run / LOG}:{number}: no entry of a log ({error})") from None
        entries.append(entry)
    return entries


def _state(log: Sequence[Mapping[str, Any]], running: bool, finished: bool) -> str:
    at = f"step {log[-1]['step']}, epoch {log[-1]['epoch']:.2f}" if log else "no step yet"
    if running:
        return f"in work: {at}"
    return "finished" if finished else f"stopped at {at}; train --resume goes on"


def _facts(spec: Spec, run: Path, done: Mapping[str, Any]) -> list[tuple[str, str]]:
    plan, manifest = _read(run, "plan.json"), _read(run / "adapter", "adapter.json")
    facts = [("base", spec.model.name), ("task", spec.model.task)]
    if plan:
        facts.append(("tuned", tuned_of(plan)))
        facts.append(("in new heads", f"{plan['head_parameters']:,}"))
    facts += [
        (f"validation {name}", figure(value))
        for name, value in done.get("validation", {}).items()
        if name != "rows" and (value is None or isinstance(value, int | float))
    ]
    if train := done.get("train"):
        facts.append(("trained", f"{train['steps']} steps, {train['epochs']:g} epochs, {train['seconds']:.0f} s"))
    if versions := manifest.get("versions"):
        facts.append(("versions", ", ".join(f"{name} {number}" for name, number in versions.items())))
    return facts


def _curves(log: Sequence[Mapping[str, Any]]) -> list[Part]:
    return [Part("curves", "Curves", figures=list(curves(log).items()))] if log else []


def _samples(log: Sequence[Mapping[str, Any]]) -> list[Part]:
    said = next((entry for entry in reversed(log) if entry.get("samples")), None)
    if said is None:
        return []
    texts = [f"{one['prompt']}\n\n-> {one['answer']}\n\nexpected: {one['expected']}" for one in said["samples"]]
    return [Part("written", f"Written at step {said['step']}", texts=texts)]


def _plan(run: Path) -> list[Part]:
    sites = _read(run, "plan.json").get("sites", [])
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for site in sites:
        label = any_layer(site["site"])
        mark = "head" if site["head"] else "" if site["merges"] else "does not merge"
        key = label, site["transform"], site["class"], " x ".join(map(str, site["shape"])), mark
        groups.setdefault(key, []).append(site)
    rows = [
        (*key[:4], str(len(own)), f"{sum(site['parameters'] for site in own):,}", key[4]) for key, own in groups.items()
    ]
    heads = ("site", "transform", "class", "n x m", "sites", "tuned", "")
    return [Part("plan", "Plan", table=Cells(heads, rows, (3, 4, 5)))] if rows else []


def _fitted(run: Path) -> list[Part]:
    found = _read(run, "fit.json")
    if not found:
        return []
    note = "What a method leaves of the change W* - W: ||phi(W) - W*|| over ||W* - W||, of all weights."
    table = Cells(*fitted_table(found), (2, 3, 4))
    return [Part("fitted", "Fitted", note, [("", fits(found["methods"]))], table=table)]


def _combined(run: Path) -> list[Part]:
    found = _read(run, "combine.json")
    if not found:
        return []
    return [Part("combined", f"Combined: {found['how']}", table=Cells(*combined_table(found), (1, 3, 4)))]


def _rewrite(drawing: str, why: str) -> list[Part]:
    note = why or "A layer's graph, frozen and rewritten: what is inserted is coloured by its class."
    return [Part("rewrite", "Rewrite", note, drawing=drawing)] if drawing or why else []


def _subspaces(found: Sequence[Subspace], why: str) -> list[Part]:
    if not found:
        return [Part("spans", "Subspaces", why)] if why else []
    note = (
        f"Span W is taken as the leading left singular vectors that hold {ENERGY:.0%} of a weight's squared norm: "
        "almost no weight lacks rank. Angles are the principal ones of the leading spans of W and phi(W)."
    )
    heads = ("weight", "n x m", "leading", "largest angle", "median angle", "rank of change", "outside", "by chance",
             "norm of change")  # fmt: skip
    rows = [
        (
            one.label, " x ".join(map(str, one.shape)), str(one.leading), f"{one.angles[0]:.2f}°",
            f"{one.angles[len(one.angles) // 2]:.2f}°", str(one.rank), f"{one.outside:.1%}", f"{one.chance:.1%}",
            f"{one.norm:.2%}",
        )
        for one in found
    ]  # fmt: skip
    return [Part("spans", "Subspaces", note, [("", angles(found))], table=Cells(heads, rows, range(1, 9)))]


def _compared(run: Path) -> list[Part]:
    found = _read(run, "verify.json")
    if not found:
        return []
    names = list(dict.fromkeys(name for one in found["metrics"].values() for name in one))
    rows = []
    for stage, apart in found["stages"].items():
        share, own = found["agreement"].get(stage), found["metrics"].get(stage, {})
        decisions = "" if share is None else f"{share:.2%}"
        rows.append((stage, f"{apart:.1e}", decisions, *(figure(own[name]) if name in own else "" for name in names)))
    rounding = "" if found["rounding"] is None else f"; its own rounding is {found['rounding']:.1e}"
    note = f"Every stage's outputs beside the tuned model's{rounding}."
    heads = ("stage", "largest difference", "same decisions", *names)
    return [Part("compared", "What ships, beside what was tuned", note, table=Cells(heads, rows, range(1, len(heads))))]


def _files(run: Path) -> list[Part]:
    found = _read(run, "export.json")
    if not found:
        return []
    heads, rows, shipped = table_of(found)
    rows = [[f"{name} -> model.onnx" if i == shipped else name, *cells] for i, (name, *cells) in enumerate(rows)]
    said = where(found)
    table = Cells(heads, rows, range(2, len(heads)))
    return [Part("files", "Files", "" if said is None else f"On {said}.", table=table)]
