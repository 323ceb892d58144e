"""The folder of a run: known by a marker file of its own, so that nothing else is ever taken for one or removed."""

import contextlib
import json
import os
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

import filelock

from .adapters.from_peft import CONFIG, TENSORS
from .errors import SubspanError
from .files import UNFINISHED, recover, remove, write_text
from .spec import Spec, differing, is_dump, load_spec
from .training.checkpoint import BUDGET, EARLIER, OPTIMISER, PREDICTIONS, STATE, TUNED, checkpoints
from .training.start import STARTED

MARKER, LOCK, PAGE = ".subspan-run", ".subspan-lock", "report.html"
FOLDERS = (
    "checkpoints", "adapter", STARTED, "merged/1_Pooling", "merged/2_Normalize", "merged/onnx", "merged", "onnx",
    "peft", "peft-lora", "swappable",
)  # fmt: skip
_NOTE = "This folder is a run of subspan. --overwrite removes what a run writes, and nothing else.\n"
# What training and export write, file by file: nothing else in these folders is touched.
WRITTEN = (
    "spec.yaml", "plan.json", "log.jsonl", "metrics.json", PREDICTIONS, "verify.json", "export.json", MARKER, LOCK,
    "fit.json", "combine.json", PAGE, "swappable/model.onnx*", "swappable/*.onnx_adapter", "swappable/*.json",
    *(f"{one}/adapter.{kind}" for one in ("adapter", STARTED) for kind in ("json", "safetensors")),
    *(f"{one}/{name}" for one in ("peft", "peft-lora") for name in (CONFIG, TENSORS, "subspan.json")),
    "trackers/**/events.out.tfevents.*", "trackers/**/hparams.yml",
    *(f"checkpoints/checkpoint-*/{name}" for name in (TUNED, OPTIMISER, BUDGET, STATE, EARLIER)),
    *(
        f"{folder}/{name}"
        for folder in ("merged", "onnx")
        for name in (
            "config.json", "*.safetensors", "*.safetensors.index.json", "generation_config.json", "model.onnx*",
            "model_*.onnx*", "onnx/model*.onnx*", "genai_config.json", "README.md",
            "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
            "preprocessor_config.json", "processor_config.json", "chat_template*",
            "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json",
        )
    ),
)  # fmt: skip


def check_folder(spec: Spec, out: Path, resume: bool | None, overwrite: bool) -> None:
    """Refuse to mix runs, and to touch what is not a run.

    Args:
        resume: None: the command can't.

    Raises:
        SubspanError: saying which option is meant.
    """
    written = out / "spec.yaml"
    if resume and overwrite:
        raise SubspanError("--resume goes on, --overwrite starts anew: give one of them")
    if out.exists() and not out.is_dir():
        raise SubspanError(f"--out {out}: is a file, not a folder")
    if not out.exists() or all(_of_a_start(file) for file in out.iterdir()):
        return
    if not (resume or overwrite):
        on = "" if resume is None else "--resume goes on with that run, "
        what = f"{on}--overwrite deletes it" if is_run(out) else "choose a new folder"
        raise SubspanError(f"--out {out}: there is something in it; {what}")
    if not is_run(out):
        option = "--resume" if resume else "--overwrite"
        way_out = "" if resume else "; delete it yourself, or choose another --out"
        raise SubspanError(f"{option}: {out} is not a run: it has no {MARKER}{way_out}")
    if resume and written.exists() and (others := differing(load_spec(written), spec)):
        raise SubspanError(f"--resume: {written} is of another run: it differs in {', '.join(others)}")
    if resume and (out / "metrics.json").exists():
        raise SubspanError(f"--resume: {out} is finished; python pipelines/export.py {out}")


def _of_a_start(file: Path) -> bool:
    """Whether a file is one of those that a run has before anything else: what died there left nothing to lose."""
    return file.name in (MARKER, LOCK) or file.name.startswith(UNFINISHED)


def spec_of(run: Path) -> Spec:
    """The spec of a run.

    Raises:
        SubspanError: the folder has none.
    """
    if not (run / "spec.yaml").is_file():
        raise SubspanError(f"{run}: no run is there: it has no spec.yaml")
    return load_spec(run / "spec.yaml")


def is_run(out: Path) -> bool:
    """Whether a folder holds a run: it has the marker, or was made before there was one.

    Such an older run is told by the files that every run wrote first: a log beside a plan.json with the plan's own keys
    and a spec.yaml that is, byte for byte, as `dump_spec` writes it.
    """
    if (out / MARKER).is_file():
        return True
    try:
        planned = json.loads((out / "plan.json").read_text(encoding="utf-8"))
        text = (out / "spec.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    ours = isinstance(planned, dict) and {"trainable_thousandths", "sites"} <= planned.keys()
    return ours and (out / "log.jsonl").is_file() and is_dump(text)


def clear(out: Path, keep: Collection[str] = ()) -> None:
    """Remove the files that a run wrote, less those to keep, and the folders that are empty then."""
    for pattern in WRITTEN:
        for file in out.glob(pattern) if pattern not in keep else ():
            remove(file)
    tracked = sorted(out.glob("trackers/**/"), reverse=True)
    for folder in (*out.glob("checkpoints/checkpoint-*"), *tracked, *(out / name for name in FOLDERS), out):
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def claimed(out: Path, main: bool = True, made: bool = True) -> Iterator[None]:
    """Have the folder of a run for oneself: no other process writes into it until the block ends.

    The folder is made and marked; what a process that died in it left unfinished is removed. After a failure that
    leaves no checkpoint to go on from, the run is taken away again. Of several processes the main one does.

    Args:
        made: whether the block makes the run (export does not).

    Raises:
        SubspanError: another process has it; with its number and host.
    """
    if not main:
        yield
        return
    new = made and (not out.exists() or all(_of_a_start(file) for file in out.iterdir()))
    out.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise SubspanError(f"{out}: another process works in it{_holder(out)}: wait for it to end") from None
    try:
        if is_run(out) or new:
            for place in (out, out / "checkpoints"):
                recover(place)
        if made or (out / MARKER).exists():
            write_text(out / MARKER, f"{_NOTE}Last used by process {os.getpid()} on {socket.gethostname()}.\n")
        yield
    except BaseException:
        if new and out.is_dir() and not checkpoints(out / "checkpoints"):
            clear(out)
        raise
    finally:
        lock.release()
        if not (out / MARKER).exists():
            remove(out / LOCK)
            if new:
                with contextlib.suppress(OSError):
                    out.rmdir()


def busy(out: Path) -> bool:
    """Whether another process works in the folder of a run."""
    if not (out / LOCK).exists():
        return False
    try:
        with filelock.FileLock(out / LOCK, timeout=0):
            return False
    except filelock.Timeout:
        return True


def _holder(out: Path) -> str:
    with contextlib.suppress(OSError):
        for line in (out / MARKER).read_text(encoding="utf-8").splitlines():
            if line.startswith("Last used by "):
                return f" ({line.removeprefix('Last used by ').removesuffix('.')})"
    return ""
