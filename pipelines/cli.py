"""The command `subspan`: validate, plan, show, train, export. Every expected failure is one line and a status of 1."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.console import Console

from rewriter import Spec, SpecError, SubspanError
from rewriter.errors import ManyErrors, raise_all, reason

console = Console(width=None if sys.stdout.isatty() else 160)
app = typer.Typer(
    help="Adapt a pretrained model with few parameters and ship it: a spec says which weights get which transform.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


Settings = Annotated[list[str] | None, typer.Option("--set", help="Override: key=value, e.g. train.epochs=2.")]


@contextlib.contextmanager
def located(spec: Spec) -> Iterator[None]:
    """Give mistakes of a spec their file, line and column."""
    try:
        yield
    except SpecError as error:
        raise spec.locate(error) from None
    except ManyErrors as several:
        raise_all([spec.locate(error) for error in several.errors])


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
        _fail("interrupted", 130)
    except SubspanError as error:
        _fail(str(error), getattr(error, "status", 1))
    except OSError as error:
        where = error.filename or place
        _fail(f"{where}: {error.strerror or error}" if where else str(error), 1)
    except Exception as error:
        if os.environ.get("SUBSPAN_TRACEBACK"):
            raise
        if "out of memory" in str(error):
            _fail("out of memory; lower train.batch_size and raise train.gradient_accumulation", 1)
        _fail(f"unexpected {type(error).__name__}: {reason(error)} (set SUBSPAN_TRACEBACK=1 to see where)", 1)


def _fail(message: str, status: int) -> None:
    for line in message.splitlines():
        print(f"error: {' '.join(line.split())}", file=sys.stderr, flush=True)
    raise typer.Exit(status) from None


def main() -> None:
    """Entry point of the installed command."""
    from pipelines.export import export
    from pipelines.plan import plan
    from pipelines.show import show
    from pipelines.train import train
    from pipelines.validate import validate

    for command in (validate, plan, show, train, export):
        app.command()(command)
    app()
