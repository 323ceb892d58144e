"""The folder of a run: known by a marker file of its own, so that nothing else is ever taken for one or removed."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from .errors import SubspanError
from .files import remove, write_text
from .spec import Spec, dump_spec, is_dump, load_spec
from .training.checkpoint import BUDGET, EARLIER, OPTIMISER, PREDICTIONS, STATE, TUNED, checkpoints

MARKER = ".subspan-run"
FOLDERS = ("checkpoints", "adapter", "merged/1_Pooling", "merged/2_Normalize", "merged", "onnx")
_NOTE = "This folder is a run of subspan. --overwrite removes what a run writes, and nothing else.\n"
# What training and export write, file by file: nothing else in these folders is touched.
WRITTEN = (
    "spec.yaml", "plan.json", "log.jsonl", "metrics.json", PREDICTIONS, "verify.json", MARKER,
    "adapter/adapter.json", "adapter/adapter.safetensors",
    "trackers/**/events.out.tfevents.*", "trackers/**/hparams.yml",
    *(f"checkpoints/checkpoint-*/{name}" for name in (TUNED, OPTIMISER, BUDGET, STATE, EARLIER)),
    *(
        f"{folder}/{name}"
        for folder in ("merged", "onnx")
        for name in (
            "config.json", "*.safetensors", "*.safetensors.index.json", "generation_config.json", "model.onnx*",
            "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
            "preprocessor_config.json", "processor_config.json", "chat_template*",
            "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json",
        )
    ),
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
        what = "--resume goes on with that run, --overwrite deletes it" if is_run(out) else "choose a new folder"
        raise SubspanError(f"--out {out}: there is something in it; {what}")
    if not is_run(out):
        option = "--resume" if resume else "--overwrite"
        way_out = "" if resume else "; delete it yourself, or choose another --out"
        raise SubspanError(f"{option}: {out} is not a run: it has no {MARKER}{way_out}")
    if resume and written.exists() and dump_spec(load_spec(written)) != dump_spec(spec):
        raise SubspanError(f"--resume: {written} is of another run; its settings differ from this spec's")
    if resume and (out / "metrics.json").exists():
        raise SubspanError(f"--resume: {out} is finished; python pipelines/export.py {out}")


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


def clear(out: Path) -> None:
    """Remove the files that a run wrote, and the folders that are empty then."""
    for pattern in WRITTEN:
        for file in out.glob(pattern):
            remove(file)
    tracked = sorted(out.glob("trackers/**/"), reverse=True)
    for folder in (*out.glob("checkpoints/checkpoint-*"), *tracked, *(out / name for name in FOLDERS), out):
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def claimed(out: Path, main: bool = True) -> Iterator[None]:
    """Make the folder and mark it; take the run away again after a failure that leaves no checkpoint to go on from.

    Of several processes the main one does.
    """
    if not main:
        yield
        return
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / MARKER, _NOTE)
        yield
    except BaseException:
        if made and out.is_dir() and not checkpoints(out / "checkpoints"):
            clear(out)
        raise
