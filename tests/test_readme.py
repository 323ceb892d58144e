"""What README shows, run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from torch import nn

from rewriter import TRANSFORMS, Spec

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
AUTHORS = (ROOT / "docs" / "transforms.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_spec_is_the_quickstart():
    block = README[README.index("## A spec") :].split("\n\n")[1]
    shown = yaml.safe_load(block)
    assert shown == yaml.safe_load((ROOT / "specs" / "quickstart.yaml").read_text())
    Spec.model_validate(shown)


def test_the_tables_have_every_method():
    table = (ROOT / "docs" / "expressions.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(TRANSFORMS)
    assert f"{len(TRANSFORMS)} methods" in README


def test_a_new_method_is_one_file(tmp_path):
    """In a copy of the package: no other file knows of it."""
    shutil.copytree(ROOT / "rewriter", tmp_path / "rewriter", ignore=shutil.ignore_patterns("__pycache__"))
    (diff,) = re.findall(r"```diff\n(.*?)```", AUTHORS, re.DOTALL)
    assert len(diff.splitlines()) <= 20
    (tmp_path / "new.diff").write_text(diff)
    subprocess.run(["git", "apply", "new.diff"], cwd=tmp_path, check=True)
    script = """
import torch
from torch import nn
from rewriter import Inputs, Rule, merge, plan, rewrite, trace, tuned_parameters
model = nn.Sequential(nn.Linear(6, 5)).double()
graph = trace(model, Inputs(args=(torch.zeros(3, 6, dtype=torch.float64),)))
found = plan(graph, [Rule(target="0.weight", apply=[{"diagonal_lora": {"rank": 4}}])])
assert found.trainable_parameters == 4 * (6 + 5) + 6, found
tuned = rewrite(graph, found)
l, a, b = (tuned_parameters(tuned)["0.weight.diagonal_lora." + name] for name in "lab")
torch.nn.init.normal_(b)
torch.nn.init.normal_(l)
x = torch.randn(3, 6, dtype=torch.float64)
expected = model(l * x) + (l * x) @ a @ b
torch.testing.assert_close(tuned(x), expected)
merge(tuned, model)
torch.testing.assert_close(model(x), expected)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_the_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = [block for block in BLOCKS if "load_adapter" in block]
    model, x = Net(), torch.randn(5, 16)
    space = {"model": model}
    before, loop = snippet.split("...", 1)
    exec(before, space)
    space["tuned"](x).square().sum().backward()
    space["optimiser"].step()
    expected = space["tuned"](x).detach()
    assert not torch.allclose(expected, model(x))
    exec(loop.partition("\n")[2], space)
    torch.testing.assert_close(model(x), expected)


def test_the_schedule_that_is_shown(tmp_path):
    """Of 2 x 4 columns half are left, the same ones that the tuned graph had."""
    (code,) = re.findall(r"```python\n(.*?)```", AUTHORS, re.DOTALL)
    (tmp_path / "halved.py").write_text(code)
    script = f"""
import torch
from rewriter import TRANSFORMS, Budget, Inputs, Rule, plan, rewrite, settle, trace, tuned_parameters
TRANSFORMS.load_file({str(tmp_path / "halved.py")!r})
model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6)).double()
graph = trace(model, Inputs(args=(torch.zeros(3, 6, dtype=torch.float64),), dynamic={{0: {{0: "batch"}}}}))
tuned = rewrite(graph, plan(graph, [Rule(target="*.weight", apply=[{{"halved_lora": {{"rank": 4}}}}])]))
budget, optimiser = Budget(tuned), torch.optim.AdamW(tuned_parameters(tuned).values(), lr=0.1)
x = torch.randn(5, 6, dtype=torch.float64)
for step in range(1, 7):
    optimiser.zero_grad()
    tuned.train()(x).square().sum().backward()
    budget.before_step()
    optimiser.step()
    budget.after_step(step, 6, optimiser)
settled = settle(tuned, budget)
assert sum(sizes["rank"] for sizes in settled.plan.given.values()) == 4, settled.plan.given
torch.testing.assert_close(settled.eval()(x), tuned.eval()(x))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
