"""The pre-commit hook and the workflow do in a scratch repository what they say, through the installed command."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests import tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def read(name):
    return YAML(typ="safe", pure=True).load((ROOT / name).read_text())


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with one right spec and one that breaks when its rank is raised."""
    root = tmp_path_factory.mktemp("repository")
    (root / "made").mkdir()
    text = tiny.project(root / "made").read_text()
    (root / "specs").mkdir()
    (root / "specs" / "right.yaml").write_text(text)
    return root


def shell(command, folder):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-e", "-c", command], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )


def test_a_broken_spec_fails_the_workflow(repository):
    steps = read(".github/workflows/specs.yml")["jobs"]["validate"]["steps"]
    annotate, log = (step["run"] for step in steps if "subspan validate" in step.get("run", ""))
    wrong = repository / "specs" / "wrong.yaml"
    wrong.write_text((repository / "specs" / "right.yaml").read_text().replace("rank: 4", "rank: 400"))
    broken = shell(annotate, repository)
    assert broken.returncode == 1
    assert broken.stdout.startswith("::error file=specs/wrong.yaml,line=14,col=27,")
    assert shell(log, repository).returncode == 1
    (result,) = json.loads((repository / "specs.sarif").read_text())["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "specs/wrong.yaml"
    wrong.unlink()


def test_the_hook_takes_the_files_of_a_commit(repository):
    (hook,) = read(".pre-commit-hooks.yaml")
    command = shlex.join([*shlex.split(hook["entry"]), *hook["args"], "specs/right.yaml"])
    right = shell(command, repository)
    assert right.returncode == 0 and "is valid" in right.stdout, right.stderr
