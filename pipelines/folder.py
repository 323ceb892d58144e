"""The folder of a run: known by a marker file of its own, so that nothing else is ever taken for one or removed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rewriter import Spec, SubspanError, dump_spec, load_spec
from rewriter.files import remove, write_text
from rewriter.tune import checkpoints

MARKER = ".subspan-run"
_NOTE = "This folder is a run of subspan. --overwrite removes what a run writes, and nothing else.\n"
# All that training and export write into a run's folder.
WRITTEN = (
    "spec.yaml", "plan.json", "log.jsonl", "checkpoints", "metrics.json", "adapter", "merged", "onnx", "verify.json",
)  # fmt: skip


def check_folder(spec: Spec, out: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to mix runs, and to touch what is not a run.

    Raises:
        SubspanError: saying which option is meant.
    """
    written = out / "spec.yaml"
    if resume and overwrite:
        raise SubspanError("--resume goes on, --overwrite starts anew: give one of them")
    if out.exists() and not out.is_dir():
        raise SubspanError(f"--out {out}: is a file, not a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (resume or overwrite):
        raise SubspanError(
            f"--out {out}: there is something in it; --resume goes on with that run, --overwrite deletes it"
        )
    if not is_run(out):
        option = "--resume" if resume else "--overwrite"
        way_out = "" if resume else "; delete it yourself, or choose another --out"
        raise SubspanError(f"{option}: {out} is not a run: it has no {MARKER}{way_out}")
    if resume and written.exists() and dump_spec(load_spec(written)) != dump_spec(spec):
        raise SubspanError(f"--resume: {written} is of another run; its settings differ from this spec's")
    if resume and (out / "metrics.json").exists():
        raise SubspanError(f"--resume: {out} is finished; python pipelines/export.py {out}")


def is_run(out: Path) -> bool:
    """Whether a folder holds a run: it has the marker, or was made before there was one.

    Such an older run is told by the two files that every run wrote first: a plan.json beside a spec.yaml that is, byte
    for byte, what `dump_spec` writes.
    """
    if (out / MARKER).is_file():
        return True
    try:
        text = (out / "spec.yaml").read_text(encoding="utf-8")
        return (out / "plan.json").is_file() and text == dump_spec(load_spec(out / "spec.yaml"))
    except (OSError, UnicodeDecodeError, SubspanError):
        return False


def clear(out: Path) -> None:
    """Remove what a run wrote, and the folder where nothing else is in it."""
    for name in (*WRITTEN, MARKER):
        remove(out / name)
    with contextlib.suppress(OSError):
        out.rmdir()


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Make the folder and mark it; take the run away again after a failure that leaves no checkpoint to go on from."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / MARKER, _NOTE)
        yield
    except BaseException:
        if made and out.is_dir() and not checkpoints(out / "checkpoints"):
            clear(out)
        raise
