"""Cells of a study: a row of specs and a seed, each tuned once, whichever process takes it. Needs the extra study."""

import contextlib
import json
import os
import re
import resource
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

import filelock
import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState
from rich.markup import escape

from pipelines.console import console
from rewriter import Session, SubspanError, load_specs
from rewriter.errors import reason
from rewriter.training.checkpoint import checkpoints
from rewriter.training.loop import steps_of
from rewriter.training.reports import Interrupted

HEARTBEAT, GRACE = 10, 40
SERVER, _LOCK = "postgresql://", 2407_05417
MEASURED = ("loss", "seconds", "peak_bytes")


def run_cells(
    specs: list[Path],
    out: Path,
    seeds: list[int],
    rows: list[str] | None,
    settings: list[str],
    name: str | None,
    retry: bool,
    server: str | None = None,
) -> bool:
    """Tune all cells of the specs that nobody has; whether none failed.

    Args:
        server: as of `open_study`.

    Raises:
        SubspanError: the table's name is a path, or a cell was run with other settings.
    """
    if name and "/" in name:
        raise SubspanError(f"--name {name}: a name, not a path")
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out, server):
        study = _study(out, server)
        known = latest(study)
        for attributes in list(_cells(specs, seeds, rows, settings, name)):
            before = known.get(attributes["cell"])
            if before is not None and before.user_attrs["settings"] != attributes["settings"]:
                was = " ".join(before.user_attrs["settings"]) or "nothing"
                raise SubspanError(f"{attributes['cell']}: its run has {was} set; give another --name")
            if before is None or (retry and before.state == TrialState.FAIL):
                study.enqueue_trial({}, user_attrs=attributes)
    while left := [trial for trial in latest(study).values() if not trial.state.is_finished()]:
        if any(trial.state == TrialState.WAITING for trial in left):
            study.optimize(lambda trial: _cell(trial, out), n_trials=1, catch=(Exception,))
        else:
            console.print(f"waiting for {len(left)} cells of other processes", highlight=False)
            optuna.storages.fail_stale_trials(study)
            time.sleep(HEARTBEAT / 2)
    cells = latest(study)
    failed = [one for one in cells.values() if one.state == TrialState.FAIL]
    for one in failed:
        why = f"{one.user_attrs['cell']}: {one.user_attrs.get('error', '')}"
        console.print(f"[bold red]failed:[/] {escape(why)}")
    done = f"{len(cells) - len(failed)} of {len(cells)} cells done"
    more = " --storage URL" if server else ""
    console.print(f"{done}: python pipelines/study.py report --out {out}{more}", highlight=False)
    return not failed


def _cells(
    specs: list[Path], seeds: list[int], rows: list[str] | None, settings: list[str], name: str | None
) -> Iterator[dict[str, Any]]:
    """What a trial has to know of its cell: its name <table>/<row>/<seed>, and where its spec is."""
    known: list[str] = []
    for file in specs:
        for spec in load_specs(file, settings):
            if "row" not in spec.meta:
                raise SubspanError(f"{file}: a row of a study needs a name: meta: {{row: ...}}")
            row = str(spec.meta["row"])
            known.append(row)
            for seed in seeds if rows is None or row in rows else []:
                cell = f"{name or file.stem}/{row}/{seed}"
                yield {"cell": cell, "file": str(file.absolute()), "row": row, "seed": seed, "settings": settings}
    if lacking := [row for row in rows or () if row not in known]:
        raise SubspanError(f"--row {lacking[0]}: there is none; the specs have {', '.join(dict.fromkeys(known))}")


def open_study(out: Path, server: str | None = None) -> optuna.Study:
    """The study of a folder, or of a database server; made, where there is none.

    Args:
        server: postgresql://user:password@host/database.

    Raises:
        SubspanError: it can't be reached, or is none that is known.
    """
    with _alone(out, server):
        return _study(out, server)


def _study(out: Path, server: str | None) -> optuna.Study:
    """What makes tables, and the study, where there are none: for one process at a time."""
    url, connection = _address(out, server)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings(), _reached():
        # Optuna calls heartbeats experimental, at every call.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.RDBStorage(
            url,
            engine_kwargs={"connect_args": connection},
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
        )
    return optuna.create_study(storage=storage, study_name="study", load_if_exists=True, direction="maximize")


def _address(out: Path, server: str | None) -> tuple[str, dict[str, int]]:
    """The database's URL, and how long, in seconds, it is waited for."""
    if server is None:
        return f"sqlite:///{out / 'study.db'}", {"timeout": 60}
    if not server.startswith(SERVER):
        raise SubspanError(f"--storage: a database server is named {SERVER}user:password@host/database")
    if find_spec("psycopg") is None:
        raise SubspanError("--storage: its driver is missing: pip install 'subspan[cluster]'")
    return f"postgresql+psycopg://{server.removeprefix(SERVER)}", {"connect_timeout": 60}


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        raise SubspanError(f"--storage: the server can't be reached: {reason(error.__cause__ or error)}") from None


@contextlib.contextmanager
def _alone(out: Path, server: str | None) -> Iterator[None]:
    """One process at a time makes the study, looks which cells there are, and adds those that are missing."""
    if server is None:
        with filelock.FileLock(out / "study.lock"):
            yield
        return
    url, arguments = _address(out, server)
    with contextlib.ExitStack() as held:
        with _reached():
            engine = sqlalchemy.create_engine(url, connect_args=arguments, poolclass=sqlalchemy.pool.NullPool)
            connection = held.enter_context(engine.begin())
            # Until the transaction ends, however that is.
            connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
        yield


def planned(
    specs: list[Path], seeds: list[int], rows: list[str] | None, settings: list[str], name: str | None
) -> Iterator[dict[str, Any]]:
    """What each row of a study would take, no weight read: its name, cells, tuned parameters, steps of a cell, FLOPs of
    all its cells' products, and bytes of weights, activations and states.

    Raises:
        SubspanError: a spec does not fit.
    """
    counts: dict[str, int] = {}
    like: Session | None = None
    for row, cells in groupby(_cells(specs, seeds, rows, settings, name), lambda one: one["cell"].rpartition("/")[0]):
        first, *more = cells
        like = session = Session(f"{first['file']}#{first['row']}", *settings, like=like)
        key = f"{session.spec.model.name} {session.spec.data.model_dump_json()}" if session.spec.data else ""
        if session.spec.data and key not in counts:
            counts[key] = len(session.read("train")[0])
        plan, cost = session.plan(whole=True), session.cost()
        steps = steps_of(session.spec, counts.get(key, 0))
        yield {
            "row": row,
            "cells": 1 + len(more),
            "tuned": plan.trainable_parameters,
            "steps": steps,
            "flops": cost.flops * cost.processes * steps * session.spec.train.gradient_accumulation * (1 + len(more)),
            "bytes": plan.weight_bytes + cost.activations + cost.optimiser,
        }


def latest(study: optuna.Study) -> dict[str, FrozenTrial]:
    """The last trial of every cell: one whose process died is followed by another."""
    trials = sorted(study.get_trials(deepcopy=False), key=lambda trial: trial.number)
    return {trial.user_attrs["cell"]: trial for trial in trials if "cell" in trial.user_attrs}


def _cell(trial: optuna.Trial, out: Path) -> float:
    """One cell; its result is the metric, what else is known goes into the trial's attributes."""
    if "cell" not in trial.user_attrs:
        raise optuna.TrialPruned("another process took the last cell")
    known = trial.user_attrs
    name, settings = known["cell"], [*known["settings"], f"train.seed={known['seed']}"]
    session = Session(f"{known['file']}#{known['row']}", *settings)
    folder = folder_of(out, name)
    console.print(f"[bold]{escape(name)}[/]", highlight=False)
    started = time.perf_counter()
    try:
        if not (folder / "metrics.json").exists():
            resume = bool(checkpoints(folder / "checkpoints"))
            _forget_peak()
            session.tune(folder, resume=resume, overwrite=not resume and folder.exists())
            trial.set_user_attr("seconds", round(time.perf_counter() - started, 1))
            trial.set_user_attr("peak_bytes", _peak())
    except (Interrupted, KeyboardInterrupt):
        trial.study.enqueue_trial({}, user_attrs=known)
        raise KeyboardInterrupt from None
    except Exception as error:
        trial.set_user_attr("error", reason(error))
        raise
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    for key in ("trainable_parameters", "total_parameters"):
        trial.set_user_attr(key, plan[key])
    measured = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["validation"]
    trial.set_user_attr("metric", session.spec.metric)
    for key in ("rows", "loss"):
        trial.set_user_attr(key, measured[key])
    return measured[session.spec.metric]


def quoted(name: str) -> str:
    """A name of a study or a row as a name of a file."""
    return quote(name, safe=" +").replace(".", "%2E")


def folder_of(out: Path, cell: str) -> Path:
    """Where a cell runs: inside the study whatever its row is called, and no other row's."""
    table, _, rest = cell.partition("/")
    row, _, seed = rest.rpartition("/")
    return out.joinpath("cells", *map(quoted, (table, row)), seed)


def _forget_peak() -> None:
    """Linux counts the peak of a process's memory anew after this; elsewhere it stays that of all cells so far."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Peak resident memory in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) * 1024
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
