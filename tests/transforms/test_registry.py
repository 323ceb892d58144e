"""The registry, and transforms of anyone: a package by its entry point, a file on the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rewriter import SubspanError
from rewriter.adapters.store import check_transforms
from rewriter.algebra import Diag
from rewriter.transforms import TRANSFORMS, Scope, transform
from tests import tiny
from tests.pipelines.test_run import call, fails

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tests" / "data" / "growing"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A spec with the package's two transforms, and the package installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("growing")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    # A copy, since a build writes beside its source, and what an earlier one left there can fail the next.
    source = shutil.copytree(PACKAGE, folder / "package", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    subprocess.run([*command, "--target", str(folder / "site"), str(source)], check=True, cwd=folder)
    spec = tiny.project(folder)
    text = spec.read_text().replace("self.{query,value}.weight", "self.query.weight")
    text = text.replace("[{lora: {rank: 4, alpha: 8, dropout: 0.1}}]", "[{growing_lora: {rank: 4}}]")
    second = '  - {target: "**.intermediate.dense.weight", apply: [{quiet_adalora: {rank: 4}}]}\n'
    spec.write_text(text.replace("train: {", second + "train: {"))
    return spec


def command(name, *arguments, site=None):
    path = os.pathsep.join(map(str, [ROOT, *([site] if site else [])]))
    line = [sys.executable, "-c", "from pipelines.cli import main; main()", name, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, cwd="/")


def test_a_package_tunes_resumes_saves_merges_and_exports(project, tmp_path):
    site, out = project.parent / "site", tmp_path / "run"
    assert "unknown method 'growing_lora'" in call("validate", project).stderr
    done = command("train", project, "--out", out, site=site)
    assert done.returncode == 0, done.stderr
    whole = load_file(out / "adapter" / "adapter.safetensors")
    manifest = json.loads((out / "adapter" / "adapter.json").read_text())
    assert manifest["transforms"]["growing_lora"] == {"package": "subspan-growing", "version": "1.2.0"}
    given = manifest["given"]
    # 12 steps, a column every second one: all four are open; adalora's half of 4 x 2 triplets is left.
    ranks = {name: sizes["rank"] for name, sizes in given.items()}
    assert [rank for name, rank in ranks.items() if name.endswith("growing_lora")] == [4, 4]
    assert sum(rank for name, rank in ranks.items() if name.endswith("quiet_adalora")) == 4
    assert whole["bert.encoder.layer.0.attention.self.query.weight.growing_lora.a"].shape == (16, 4)

    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", out, broken], check=True)
    for name in ("adapter", "metrics.json", "checkpoints/checkpoint-12"):
        subprocess.run(["rm", "-r", broken / name], check=True)
    done = command("train", project, "--out", broken, "--resume", site=site)
    assert done.returncode == 0, done.stderr
    resumed = load_file(broken / "adapter" / "adapter.safetensors")
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)

    done = command("export", out, "--no-measure", site=site)
    assert done.returncode == 0, done.stderr
    assert (out / "merged").is_dir() and json.loads((out / "verify.json").read_text())["max_abs_diff"] <= 1e-4
    missing = fails("export", broken)
    assert "tuned with 'growing_lora' of subspan-growing 1.2.0, which is not here" in missing
    assert "pip install subspan-growing==1.2.0" in missing


def test_a_file_on_the_command_line(project, tmp_path):
    file = PACKAGE / "src" / "subspan_growing.py"
    shown = command("plan", project, "--transforms", file)
    assert shown.returncode == 0 and "growing_lora(rank=4)" in shown.stdout, shown.stderr
    (tmp_path / "broken.py").write_text("import nowhere_at_all\n")
    (tmp_path / "empty.py").write_text("x = 1\n")
    wrong = {"broken.py": "No module named", "empty.py": "registers no transform", "none.py": "No such file"}
    for name, message in wrong.items():
        assert message in fails("validate", project, "--transforms", tmp_path / name)


def test_a_file_that_changed_is_another_one(tmp_path, monkeypatch):
    """An adapter knows the file that its transforms were written in, by its hash."""
    monkeypatch.setattr(TRANSFORMS, "_found", dict(TRANSFORMS.items()))
    code = "from rewriter.transforms import transform\n@transform('extension')\ndef mine(w, site):\n    return w\n"
    (tmp_path / "mine.py").write_text(code)
    TRANSFORMS.load_file(tmp_path / "mine.py")
    for version in ("sha256:0", TRANSFORMS["mine"].origin.version):
        manifest = {"transforms": {"mine": {"package": "mine.py", "version": version}}}
        (tmp_path / "adapter.json").write_text(json.dumps(manifest))
        if version == "sha256:0":
            with pytest.raises(SubspanError, match="give the file it was tuned with"):
                check_transforms(tmp_path)
        else:
            check_transforms(tmp_path)


def test_a_spec_names_no_file(project, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(f"transforms: {PACKAGE}\n" + project.read_text())
    assert "unknown key 'transforms'" in call("validate", wrong, "--level", "schema").stderr


def test_the_class_is_declared():
    with pytest.raises(TypeError, match="kind is one of"):
        transform("exotic")
    with pytest.raises(TypeError, match="on are some of"):
        transform("extension", on=("everything",))


def test_a_name_is_taken_once():
    def lora(w, site: Scope):
        """Another one."""
        return w @ Diag(site.tuned("l", site.m, 1.0))

    with pytest.raises(SubspanError, match="there is a transform 'lora' already, of subspan"):
        transform("extension")(lora)
    assert TRANSFORMS["lora"].origin.package == "subspan"


def test_what_can_not_be_loaded_is_told(monkeypatch):
    from rewriter.spec.explain import unknown_transform

    monkeypatch.setattr(TRANSFORMS, "broken", {"subspan-mine": "No module named 'x'"})
    assert "those of subspan-mine can't be loaded: No module named 'x'" in unknown_transform("exotic")
