"""What a run says: plain lines in a log, a bar on a terminal, everything in log.jsonl."""

import os
import pty
import subprocess
import sys
from pathlib import Path

from rewriter import Session
from tests import tiny

ROOT = Path(__file__).parents[2]
SCRIPT = "import sys; from rewriter import Session; Session(sys.argv[1]).tune(sys.argv[2])"


def test_a_log_gets_plain_lines(tmp_path, capsys):
    session = Session(tiny.project(tmp_path))
    capsys.readouterr()
    session.tune(tmp_path / "run")
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split("  ")[0] for line in lines if "  loss " in line] == [f"step {n}/12" for n in range(2, 13, 2)]
    assert sum("eval_accuracy" in line for line in lines) == 2
    assert "\r" not in said.out + said.err and "%|" not in said.err and "\x1b" not in said.out


def test_a_terminal_gets_a_bar(tmp_path):
    """Of the steps; what is evaluated stays as a line."""
    spec = tiny.project(tmp_path)
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    line = [sys.executable, "-c", SCRIPT, str(spec), str(tmp_path / "run")]
    process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:
            break
        if not part:
            break
        said += part
    assert process.wait() == 0
    text = said.decode()
    assert "12/12" in text and "\x1b[" in text and text.count("eval_accuracy") == 2
    assert "step 2/12" not in text
