"""Results of a study: its records, tables and pictures. Needs the extra study."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from pipelines.cells import MEASURED, latest, open_study, quoted
from pipelines.console import console
from rewriter import SubspanError
from rewriter.errors import reason
from rewriter.files import write_json, write_text

BASE = "head alone"
LINES = {"full fine-tuning": {"color": "black", "linestyle": "--"}, BASE: {"color": "grey", "linestyle": ":"}}


def write_results(out: Path, to: Path, server: str | None = None) -> None:
    """results.md, results.json and the pictures, from a study's folder, its database server, or a results.json.

    Raises:
        SubspanError: it is neither, or no cell is finished.
    """
    records = _records(out, server)
    to.mkdir(parents=True, exist_ok=True)
    write_json(to / "results.json", records)
    write_text(to / "results.md", page(records))
    for name in dict.fromkeys(record["study"] for record in records):
        draw(name, [record for record in records if record["study"] == name], to)
    console.print(f"{len(records)} cells: {to / 'results.md'}")


def _records(out: Path, server: str | None) -> list[dict[str, Any]]:
    if out.is_file():
        try:
            return json.loads(out.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SubspanError(f"{out}: not the results.json of a report: {reason(error)}") from error
    if server is None and not (out / "study.db").is_file():
        raise SubspanError(f"{out}: no study.db there; python pipelines/study.py run ... --out {out}")
    records = [
        _record(cell, trial) for cell, trial in latest(open_study(out, server)).items() if trial.state.is_finished()
    ]
    if not records:
        raise SubspanError(f"{out}: no cell is finished yet")
    return records


def _record(cell: str, trial: FrozenTrial) -> dict[str, Any]:
    keys = ("row", "seed", "metric", "trainable_parameters", "total_parameters", "rows", *MEASURED, "error")
    value = trial.value if trial.state == TrialState.COMPLETE else None
    return {"study": cell.partition("/")[0], "value": value, **{key: trial.user_attrs.get(key) for key in keys}}


def _error(row: dict[str, Any], record: dict[str, Any]) -> float | None:
    """Standard error of the mean: over seeds; with one seed, of a share of rows that are right."""
    if row["deviation"] is not None:
        return row["deviation"] / math.sqrt(row["seeds"])
    if record["metric"] == "accuracy" and record["rows"]:
        return math.sqrt(row["mean"] * (1 - row["mean"]) / record["rows"])
    return None


def summaries(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each row of a study, best first: mean and sample standard deviation over the seeds that finished."""
    rows = []
    for name in dict.fromkeys(record["row"] for record in records):
        own = [record for record in records if record["row"] == name]
        done = [record for record in own if record["value"] is not None]
        values = [record["value"] for record in done]
        row: dict[str, Any] = {"row": name, "failed": len(own) - len(done), "seeds": len(done)}
        if done:
            tuned, total = done[0]["trainable_parameters"], done[0]["total_parameters"]
            row |= {"tuned": tuned, "share": 1000 * tuned / total, "mean": statistics.mean(values)}
            row["deviation"] = statistics.stdev(values) if len(values) > 1 else None
            row["error"] = _error(row, done[0])
            for key in MEASURED:
                known = [record[key] for record in done if record[key] is not None]
                row[key] = statistics.mean(known) if known else None
        rows.append(row)
    return sorted(rows, key=lambda row: -row.get("mean", -math.inf))


# What the source's Tables II to IV say of the ranking: better ones, then worse ones.
CLAIMS = [
    (("ssb",), ("ssl", "ia3")),
    (("ssl", "ia3"), ("sam_parser",)),
    (("flora",), ("adalora",)),
    (("adalora", "trilora"), ("lora",)),
    (("lora + mpc o", "lora + mpc d", "lora + mpc n"), ("lora",)),
    (("trilora + mpc o",), ("trilora",)),
    (("adalora",), ("adalora - mpc o",)),
]


def page(records: list[dict[str, Any]]) -> str:
    """results.md."""
    parts = [
        "# Results",
        "Written by `python pipelines/study.py report` from the records of `python pipelines/study.py run`, which are "
        "in results.json. Deviations and standard errors are over seeds; with one seed, the error is that of a share "
        "of so many rows. Seconds and peak memory are of a whole run on a machine that did other things too.",
    ]
    for name in dict.fromkeys(record["study"] for record in records):
        rows = summaries([record for record in records if record["study"] == name])
        metric = next((one["metric"] for one in records if one["study"] == name and one["metric"]), "metric")
        parts += [
            f"## {name}",
            f"![share of parameters against {metric}]({quoted(name)}.svg)",
            _table(rows, metric),
            _said(rows),
        ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(rows: list[dict[str, Any]], metric: str) -> str:
    lines = [
        f"| method | tuned | thousandths | {metric} | loss | seeds | seconds | peak MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        failed = f"{row['failed']} failed" if row["failed"] else ""
        if "mean" not in row:
            lines.append(f"| {row['row']} | | | **{failed}** | | 0 | | |")
            continue
        spread = f" ± {row['deviation']:.4f}" if row["deviation"] is not None else ""
        seeds = f"{row['seeds']}, **{failed}**" if failed else str(row["seeds"])
        loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"
        counts = f"{row['tuned']:,} | {row['share']:.3f}"
        lines.append(f"| {row['row']} | {counts} | {row['mean']:.4f}{spread} | {loss} | {seeds} | {seconds} | {peak} |")
    return "\n".join(lines)


def _said(rows: list[dict[str, Any]]) -> str:
    """Whether the source's ranking is found here, pair by pair; what PEFT reaches; what is below the head alone."""
    known = {row["row"]: row for row in rows if "mean" in row}
    pairs = [(one, other) for better, worse in CLAIMS for one in better for other in worse]
    lines = []
    for first, second in ((known[one], known[other]) for one, other in pairs if {one, other} <= known.keys()):
        apart = first["mean"] - second["mean"]
        errors = [row["error"] for row in (first, second)]
        error = None if None in errors else math.hypot(*errors)
        found = ("yes" if apart > 0 else "no") + (", within the error" if error and abs(apart) < error else "")
        shown = f" ± {error:.4f}" if error else ""
        losses = [row["loss"] for row in (first, second)]
        lower = "" if None in losses else "yes" if losses[0] < losses[1] else "no"
        lines.append(f"| {first['row']} > {second['row']} | {found} | {apart:+.4f}{shown} | {lower} |")
    parts = []
    if len(known) > 1 and len({row["mean"] for row in known.values()}) == 1:
        parts.append("Every row ends with the same value: this run shows no difference but in the loss.")
    if lines:
        parts += [
            "The source's ranking, here:",
            "\n".join(["| | found | difference | by loss |", "| --- | --- | ---: | --- |", *lines]),
        ]
    for name in known:
        if (peft := known.get(f"{name} of PEFT")) is not None:
            apart = known[name]["mean"] - peft["mean"]
            parts.append(f"PEFT's {name} on the same setting: {peft['mean']:.4f}, {apart:+.4f} from ours.")
    if BASE in known:
        base = known[BASE]["mean"]
        below = [name for name, row in known.items() if row["mean"] < base]
        parts.append(f"Below the head alone ({base:.4f}): {', '.join(below) or 'none'}.")
    return "\n\n".join(parts)


def draw(name: str, records: list[dict[str, Any]], to: Path) -> None:
    """Share of parameters against the metric, a point a method, as <name>.svg and <name>.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from adjustText import adjust_text

    plt.rcParams["svg.hashsalt"] = "subspan"
    rows = [row for row in summaries(records) if "mean" in row]
    figure, axes = plt.subplots(figsize=(11, 7))
    labels = []
    for row in rows:
        if row["row"] in LINES:
            axes.axhline(row["mean"], linewidth=1, **LINES[row["row"]])
            at = {"xycoords": ("axes fraction", "data"), "va": "bottom", "fontsize": 8}
            axes.annotate(row["row"], (0.01, row["mean"]), **at)
        else:
            axes.errorbar(row["share"], row["mean"], yerr=row["deviation"], fmt="o", markersize=5, capsize=3)
            labels.append(axes.text(row["share"], row["mean"], row["row"], fontsize=8))
    label = "tuned parameters, thousandths of the model's"
    axes.set(xscale="log", xlabel=label, ylabel=records[0]["metric"], title=name)
    axes.margins(x=0.12)
    figure.tight_layout()
    adjust_text(
        labels,
        ax=axes,
        expand=(1.1, 1.6),
        iter_lim=1000,
        arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.5},
    )
    for suffix in ("svg", "png"):
        aside = to / f".{quoted(name)}.{suffix}"
        figure.savefig(aside, format=suffix, dpi=120, metadata={"Date": None} if suffix == "svg" else None)
        aside.replace(to / f"{quoted(name)}.{suffix}")
    plt.close(figure)
