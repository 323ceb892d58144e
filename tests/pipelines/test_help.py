"""Help that comes at once: no command loads what it needs for work before it works."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.bench import COMMANDS

ROOT = Path(__file__).parents[2]
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "sklearn",
    "onnx",
    "onnxruntime",
    "optuna",
    "peft",
    "matplotlib",
}
HELP = """
import runpy, sys
sys.argv = [{name!r}, *{more!r}, "--help"]
try:
    runpy.run_module("pipelines.{name}", run_name="__main__")
except SystemExit as done:
    assert not done.code, done.code
print("LOADED", *sys.modules, file=sys.stderr)
"""
OWN = {
    "cli": ("train", "export", "validate", "plan", "passes", "show", "schema"),
    "study": ("run", "report"),
    "bench": ("accuracy", "beside", "lora", "convert", "validate", "step", "start"),
}


def python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    ("name", "more"), [(name, []) for name in COMMANDS] + [(name, [one]) for name in OWN for one in OWN[name]]
)
def test_help_loads_nothing_heavy(name, more):
    done = python(HELP.format(name=name, more=more))
    assert "Usage" in done.stdout and not HEAVY & set(done.stderr.partition("LOADED")[2].split())


@pytest.mark.parametrize(
    ("code", "without"),
    [
        ("import rewriter", HEAVY),
        ("import rewriter; dir(rewriter)", HEAVY),
        ("from rewriter import Inputs, Rule, merge, plan, rewrite, save_adapter, trace", HEAVY - {"torch"}),
        (
            "from rewriter import Session",
            {"onnx", "onnxruntime", "sklearn", "optuna", "peft", "torch.distributed.checkpoint"},
        ),
    ],
)
def test_names_are_imported_when_they_are_used(code, without):
    done = python(f"{code}\nimport sys; print(*sys.modules)")
    assert not without & set(done.stdout.split())


def test_every_public_name_is_there():
    python("import rewriter\nfor name in rewriter.__all__: assert getattr(rewriter, name) is not None, name")
