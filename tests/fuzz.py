"""Hostile inputs: `python -m tests.fuzz --cases 10000`. Specs, adapters, run folders and data files, changed at random.

Each is read or refused: by an error of ours, or of the system, and within ten seconds. Anything else is a fault, and its
seed makes it again: `--seed <n> --cases 1`.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from rewriter import Rule, Session, Spec, SubspanError, load_adapter, load_rows, plan, rewrite, save_adapter
from rewriter.folder import spec_of
from rewriter.spec import load_specs
from tests.adapters.test_store import net, traced
from tests.tiny import project, save_csv

LIMIT = 10.0
EDGES = [
    "0", "-1", "1", "2", "1e308", "1e-320", "-0.0", ".inf", "-.inf", ".nan", "null", "~", "true", "''", "'a'", "[]", "{}",
    "[[]]", "[1, 2]", "{a: 1}", "9" * 30, "0x10", "1_000", "2 ** 64", "18446744073709551615", "9007199254740993", "0.5",
    "!!int x", "!!str 1", "!!python/object:os.system x", "&a [*a]", "*b", "|", ">-", "'\\0'", '"\\0"', '"\\e[2J"', "é", "\u202e",
    "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "/", "..", "~x", "package://", "package://os/x", "#", "- ", "? ", ": ", "%", "@", "`",
]  # fmt: skip


def spec_text(draw: random.Random, text: str) -> str:
    """A spec with some lines, values or characters changed."""
    lines = text.splitlines()
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        i, how = draw.randrange(len(lines)), draw.randrange(8)
        if how <= 2 and ":" in lines[i]:
            key, _, _ = lines[i].partition(":")
            lines[i] = f"{key}: {draw.choice(EDGES)}"
        elif how == 3:
            lines[i] = ("  " * draw.randrange(4)) + lines[i].strip()
        elif how == 4:
            lines.insert(i, lines[draw.randrange(len(lines))])
        elif how == 5:
            del lines[i]
            lines = lines or [""]
        elif how == 6:
            at = draw.randrange(len(lines[i]) + 1)
            lines[i] = lines[i][:at] + draw.choice(EDGES) + lines[i][at + draw.randrange(3) :]
        else:
            parts = lines[i].replace(",", " , ").split(" ")
            parts[draw.randrange(len(parts))] = draw.choice(EDGES)
            lines[i] = " ".join(parts)
    return "\n".join(lines) + "\n"


def changed_bytes(draw: random.Random, data: bytes) -> bytes:
    """Some bytes flipped, cut off, put in or doubled."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at, how = draw.randrange(len(out) + 1), draw.randrange(5)
        if how == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            del out[at : at + draw.choice((1, 4, 100, len(out)))]
        elif how == 2:
            out[at:at] = draw.choice(
                (b"\0", b"null", b"NaN", b"[", b"{", b'"', b"\xff\xfe", b"1e999", b",", b"\r", b"-1")
            )
        elif how == 3:
            out += out[at:]
        elif at < len(out):
            out[at] = draw.randrange(256)
    return bytes(out[:1_000_000])


class World:
    """What is changed: a tiny project, an adapter of every kind of tensor, a finished run, and files of data."""

    def __init__(self, place: Path):
        self.place = place
        self.text = project(place).read_text()
        rules = [
            {"target": "0.weight", "apply": [{"fourierft": {"frequencies": 8}}]},
            {"target": "2.weight", "apply": ["ssb"]},
        ]
        graph = traced(net())
        save_adapter(rewrite(graph, plan(graph, [Rule.model_validate(rule) for rule in rules])), place / "adapter")
        Session(place / "spec.yaml", "train.max_steps=2", "export.onnx=null", "train.checkpoint_steps=1").tune(
            place / "run"
        )
        rows = [{"text": "good film", "label": i % 2} for i in range(8)]
        self.data = {
            "csv": save_csv(place / "d.csv", 12).read_bytes(),
            "json": "".join(json.dumps(row) + "\n" for row in rows).encode(),
            "text": b"good film\n\nbad film\n",
        }
        self.base = Session(place / "spec.yaml")
        self.base.plan()

    def schema(self, draw: random.Random) -> None:
        file = self.place / "fuzzed.yaml"
        file.write_bytes(spec_text(draw, self.text).encode("utf-8", "surrogatepass"))
        for spec in load_specs(file):
            self.spec = spec

    def planned(self, draw: random.Random) -> None:
        self.schema(draw)
        session = Session(self.spec, like=self.base)
        session.plan()
        session.check_data()

    def settings(self, draw: random.Random) -> None:
        keys = ("train.epochs", "model.task", "data.limit.train", "rules.0.apply.0.lora.rank", "rules.0.target", "data.split", "export.onnx", "x", "rules.9", "model.config", "meta.row", "data.where.label")  # fmt: skip
        Session(self.place / "spec.yaml", f"{draw.choice(keys)}={draw.choice(EDGES)}", like=self.base).plan()

    def adapter(self, draw: random.Random) -> None:
        folder = self.place / "fuzzed-adapter"
        shutil.copytree(self.place / "adapter", folder, dirs_exist_ok=True)
        file = folder / draw.choice(("adapter.json", "adapter.safetensors"))
        file.write_bytes(changed_bytes(draw, file.read_bytes()))
        load_adapter(traced(net()), folder)

    def rows(self, draw: random.Random) -> None:
        format = draw.choice(list(self.data))
        file = self.place / f"fuzzed.{format}"
        file.write_bytes(changed_bytes(draw, self.data[format]))
        columns = {"text": "text"} if format == "text" else {"text": "text", "label": "label"}
        spec = Spec.model_validate(
            {
                "version": 1,
                "model": {"name": "x", "task": "causal-lm" if format == "text" else "sequence-classification"},
                "data": {"format": format, "files": str(file), "columns": columns, "split": {"validation": 1}},
                "rules": [{"target": "w", "apply": ["ssb"]}],
            }
        )
        load_rows(spec, ["0", "1"])

    def run(self, draw: random.Random) -> None:
        folder = self.place / "fuzzed-run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.place / "run", folder)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        file = draw.choice(files)
        file.write_bytes(changed_bytes(draw, file.read_bytes()))
        if draw.random() < 0.5:
            Session(spec_of(folder)).export(folder)
        else:
            (folder / "metrics.json").unlink()
            Session(spec_of(folder)).tune(folder, resume=True)

    def one(self, seed: int) -> str:
        draw = random.Random(seed)
        kinds: list[tuple[Callable[[random.Random], None], int]] = [
            (self.schema, 60), (self.planned, 8), (self.settings, 4), (self.adapter, 16), (self.rows, 9), (self.run, 3),
        ]  # fmt: skip
        kind = draw.choices([one for one, _ in kinds], [weight for _, weight in kinds])[0]
        kind(draw)
        return kind.__name__


def fuzz(cases: int, seed: int, say: Callable[[str], None]) -> int:
    """How many cases of so many were faults."""
    faults, counts = 0, Counter()
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()):
            world = World(Path(place))
        for number in range(seed, seed + cases):
            start, how = time.monotonic(), "read"
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    world.one(number)
            except (SubspanError, OSError) as error:
                how = "refused" if str(error).strip() else "without a word"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                how = f"{type(error).__name__}: {error}"[:300]
                where = traceback.extract_tb(error.__traceback__)[-1]
                how += f" ({Path(where.filename).name}:{where.lineno})"
            took = time.monotonic() - start
            if how not in ("read", "refused") or took > LIMIT:
                faults += 1
                say(f"seed {number}: {took:.1f} s, {how}")
            counts[how if how in ("read", "refused") else "fault"] += 1
            if (number - seed + 1) % 500 == 0:
                say(f"{number - seed + 1} cases: {dict(counts)}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    out = sys.stdout
    faults = fuzz(given.cases, given.seed, lambda line: print(line, file=out, flush=True))
    print(f"{given.cases} cases, {faults} faults")
    sys.exit(int(faults > 0))


if __name__ == "__main__":
    main()
