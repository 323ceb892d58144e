"""What a run says while it goes: log.jsonl, trackers, and a progress bar on a terminal or plain lines in a log."""

import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..errors import SpecError, SubspanError
from ..spec import Spec
from .parallel import processes

LOG, TRACKED = "log.jsonl", "trackers"
_SHOWN = 300  # characters of a text on the console


class Interrupted(SubspanError):
    """Tuning was stopped by a signal; a checkpoint holds everything up to there. `status` is a shell's for that."""

    status = 130


class Stop:
    """Whether a signal asked to stop."""

    asked = False


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM ask to stop; a second Ctrl-C stops at once."""
    found = Stop()

    def stop(number, frame):
        if found.asked:
            raise KeyboardInterrupt
        found.asked = True
        print("\nstopping after this step; once more stops at once", flush=True)

    try:
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # Only the main thread may handle signals.
        before = {}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_trackers(spec: Spec) -> None:
    """Every tracker of a spec is installed.

    Raises:
        SpecError: at the first that is not.
    """
    if spec.train.track:
        from accelerate.tracking import get_available_trackers

        there = {str(getattr(one, "value", one)) for one in get_available_trackers()}
        for i, name in enumerate(spec.train.track):
            if name not in there:
                raise SpecError(f"{name} is not installed: pip install {name}", ("train", "track", i))


class Report:
    """Where a run's log goes; the main process alone reports.

    Args:
        spec: its trackers and its metric are read.
        folder: of the run.
        steps: optimiser steps of the whole run.
        history: entries of an earlier part of the run.
    """

    def __init__(self, spec: Spec, folder: Path, steps: int, history: list[dict[str, Any]]):
        self.file, self.steps, self.trackers = folder / LOG, steps, []
        self.main = processes().is_main_process
        if not self.main:
            return
        self.file.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")
        self.console = Console(soft_wrap=True, highlight=False)
        columns = (
            TextColumn("tune"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[said]}"),
        )
        self.bar = Progress(*columns, console=self.console, disable=not sys.stdout.isatty(), transient=True)
        self.task = self.bar.add_task("tune", total=steps, said="")
        if spec.train.track:
            self._track(spec, folder)

    def _track(self, spec: Spec, folder: Path) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        (folder / TRACKED).mkdir(exist_ok=True)
        for name in spec.train.track:
            kind = LOGGER_TYPE_TO_CLASS[name]
            own = {"logging_dir": folder / TRACKED} if kind.requires_logging_directory else {}
            tracker = kind("subspan", **own)
            tracker.start()
            tracker.store_init_configuration(dict(_flat(spec.model_dump(mode="json", by_alias=True))))
            self.trackers.append(tracker)

    def __enter__(self) -> "Report":
        if self.main:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.main:
            self.bar.stop()
            for tracker in self.trackers:
                tracker.finish()

    def step(self, step: int) -> None:
        """A step is done."""
        if self.main:
            self.bar.update(self.task, completed=step)

    def write(self, entry: dict[str, Any]) -> None:
        """Put an entry into the log and before the user."""
        if not self.main:
            return
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(entry) + "\n")
        values = {key: value for key, value in entry.items() if key not in ("step", "epoch", "samples")}
        shown = "  ".join(f"{key} {'no number' if one is None else f'{one:.4g}'}" for key, one in values.items())
        if self.bar.disable or "loss" not in entry:
            self.console.print(f"step {entry['step']}/{self.steps}  {shown}")
        if entry.get("samples"):
            self.console.print(_block(entry["samples"]), soft_wrap=False)
        self.bar.update(self.task, said=shown if "loss" in entry else "")
        for tracker in self.trackers:
            tracker.log({k: v for k, v in entry.items() if k not in ("step", "samples")}, step=entry["step"])


def _block(samples: Sequence[Mapping[str, Any]]) -> Table:
    """Samples of what was written, one under the other; of a long text the end of a prompt, or the start."""
    table = Table.grid(padding=(0, 2))
    for i, one in enumerate(samples):
        cut = "" if one["stopped"] else " ..."
        long = len(one["prompt"]) > _SHOWN
        asked = f"... {one['prompt'][-_SHOWN:]}" if long else one["prompt"]
        rows = {"prompt": asked, "expected": one["expected"][:_SHOWN], "answer": one["answer"][:_SHOWN] + cut}
        for name, text in rows.items():
            table.add_row(Text(f"  {name}"), Text(text.strip()))
        if i + 1 < len(samples):
            table.add_row("", "")
    return table


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Settings as trackers take them: one level, numbers and texts."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _flat(one, f"{path}.{key}" if path else str(key))
    elif value is not None:
        yield path, value if isinstance(value, int | float | bool | str) else json.dumps(value)
