"""What all commands share: options, the console, and failures as one line with a status of 1."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.console import Console

from rewriter.errors import SubspanError, reason

# It says that it can't fetch a kernel from a hub, on every start; transformers imports it where it is installed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
console = Console(width=None if sys.stdout.isatty() else 160)
STOPPED = 130  # As a shell says of Ctrl-C: no error.
MAIN = os.environ.get("RANK", "0") == "0"  # Of several processes, the one that speaks.


def _loaded(files: list[Path] | None) -> list[Path] | None:
    if files:
        from rewriter import TRANSFORMS

        with failures():
            for file in files:
                TRANSFORMS.load_file(file)
    return files


Transforms = Annotated[
    list[Path] | None,
    typer.Option(
        "--transforms",
        callback=_loaded,
        help="A Python file that registers transforms of your own; its code is run. A spec can't name one.",
        show_default=False,
    ),
]
Without = Annotated[
    list[str] | None, typer.Option("--without", help="Leave out a pass over the graph; `passes` lists them.")
]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Override: key=value, e.g. train.epochs=2.")]


def overrides(settings: list[str] | None, without: list[str] | None = None) -> list[str]:
    """All settings of a command line: those of --set, and the passes that are left out."""
    return [*(settings or []), *([f"train.passes.off=[{', '.join(without)}]"] if without else [])]


@contextlib.contextmanager
def failures(place: Path | None = None) -> Iterator[None]:
    """Turn what can go wrong into one line on stderr and an exit status: 1 for a failure, 130 when interrupted.

    Args:
        place: where the command writes, for errors of the system that don't say.
    """
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        _fail("interrupted", STOPPED, "")
    except SubspanError as error:
        status = getattr(error, "status", 1)
        _fail(str(error) if MAIN else "", status, "" if status == STOPPED else "error: ")
    except OSError as error:
        where = error.filename or place
        _fail(f"{where}: {error.strerror or error}" if where else str(error), 1)
    except Exception as error:
        if os.environ.get("SUBSPAN_TRACEBACK"):
            raise
        if "out of memory" in str(error):
            more = "raise train.gradient_accumulation, or set train.gradient_checkpointing: true"
            _fail(f"out of memory; lower train.batch_size and {more}", 1)
        _fail(f"unexpected {type(error).__name__}: {reason(error)} (set SUBSPAN_TRACEBACK=1 to see where)", 1)


def _fail(message: str, status: int, before: str = "error: ") -> None:
    for line in message.splitlines():
        print(f"{before}{' '.join(line.split())}", file=sys.stderr, flush=True)
    raise typer.Exit(status) from None
