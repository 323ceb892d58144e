"""What the pages of docs/ show, run; and that their tables leave nothing out."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import rewriter
from pipelines import cli
from rewriter import TASKS, TRANSFORMS, Session, load_specs, task_of, tuned_parameters
from rewriter.spec import data, models
from rewriter.training.optimisers import check_schedule
from tests import tiny

ROOT = Path(__file__).parent.parent
PAGES = {file.stem: file.read_text() for file in (ROOT / "docs").glob("*.md")}


def blocks(page, language):
    """The fenced blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def block(page, language, word):
    """The one that has a word."""
    (found,) = [one for one in blocks(page, language) if word in one]
    return found


def words(*pages):
    """All words in the pages' code spans."""
    text = re.sub(r"```.*?```", "", "".join(PAGES[page] for page in pages), flags=re.DOTALL)
    return set(re.findall(r"[\w@]+", " ".join(re.findall(r"`([^`]+)`", text))))


def run(script, folder, *arguments, path=()):
    """A script in a process of its own, which finds packages in `path` first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def copied(folder, diff):
    """A copy of the package with a page's diff applied; what it was before, and what it is now: file -> text."""
    shutil.copytree(ROOT / "rewriter", folder / "rewriter", ignore=shutil.ignore_patterns("__pycache__"))
    before = contents(folder)
    (folder / "new.diff").write_text(diff)
    subprocess.run(["git", "apply", "new.diff"], cwd=folder, check=True)
    return before, contents(folder)


def contents(folder):
    return {str(file.relative_to(folder)): file.read_text() for file in (folder / "rewriter").rglob("*.py")}


def test_the_tables_have_every_method():
    assert set(re.findall(r"^\| `(\w+)` \|", PAGES["expressions"], re.MULTILINE)) == set(TRANSFORMS)


# specs.md and ci.md


@pytest.mark.parametrize("shown", blocks("specs", "yaml"))
def test_the_specs_that_are_shown(shown, tmp_path):
    """A whole one is planned; what is a part stands for the quickstart's own keys."""
    quickstart, given = yaml.safe_load((ROOT / "specs" / "quickstart.yaml").read_text()), yaml.safe_load(shown)
    whole = "version" in given
    file = tmp_path / "spec.yaml"
    file.write_text(shown if whole else yaml.safe_dump({**quickstart, **given}))
    specs = load_specs(file)
    assert len(specs) == (3 if "variants" in given else 1)
    for spec in specs:
        check_schedule(spec.train, spec.task.lower(spec.metric))
        if whole:
            assert Session(spec).plan().trainable_parameters


SECTIONS = [
    *("Spec", "Model", "Rule", "Slice", "Train", "Generate", "Passes", "Export", "Onnx", "Verify", "Limits"),
    *("Data", "Part", "Split", "Limit", "Turns"),
]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_of_a_spec_is_explained(section):
    fields = getattr(models if hasattr(models, section) else data, section).model_fields
    assert not {field.alias or name for name, field in fields.items()} - words("specs", "ci")
    assert set(models.SCHEDULES) <= words("specs")


def test_the_limits_that_are_shown():
    (limits,) = re.findall(r"^    (limits: .*)$", PAGES["ci"], re.MULTILINE)
    assert set(yaml.safe_load(limits)["limits"]) == set(models.Limits.model_fields)
    models.Limits.model_validate(yaml.safe_load(limits)["limits"])


# commands.md


def test_every_command_is_there():
    names = {name for name, one in vars(cli).items() if getattr(one, "__module__", "").startswith("pipelines.")}
    assert len(names) > 6
    assert set(re.findall(r"^\| `subspan ([\w-]+)", PAGES["commands"], re.MULTILINE)) == {
        name.replace("_", "-") for name in names - {"main"}
    }


# tasks.md


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_there_with_all_that_it_reads_and_measures(name):
    task = task_of(name)
    (row,) = [line for line in PAGES["tasks"].splitlines() if line.startswith(f"| `{name}` |")]
    _, _, columns, metrics, outputs, options, _ = row.split("|")
    roles = {role: (kind, not left) for role, kind, left in re.findall(r"`(\w+)`: (\w+)(, may be left out)?", columns)}
    assert roles == {role: (one.kind, one.required) for role, one in task.roles.items()}
    assert tuple(re.findall(r"`([\w@]+)`", metrics)) == task.metrics
    assert set(re.findall(r"`(\w+)`", options)) == set(task.Options.model_fields) and outputs.strip()


NEW_TASK = """
import csv, json, sys
from pathlib import Path
import onnxruntime, torch
import rewriter
from rewriter import Session, SubspanError
from tests import tiny

here = Path(sys.argv[1])
assert Path(rewriter.__file__).is_relative_to(here)
spec, model, data = here / "spec.yaml", tiny.save_model(here / "model"), tiny.save_csv(here / "data.csv")
with data.open(newline="") as file:
    texts = [row["text"] for row in csv.DictReader(file)]
def write(counts):
    with data.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts, counts)])
write([text.split().count("film") for text in texts])
settings = tiny.SPEC.replace("  labels: [negative, positive]\\n", "").format(model=model, data=data)
spec.write_text(settings.replace("sequence-classification", "count-regression"))
session = Session(spec)
assert session.cost().activations > 0
metrics = session.tune(here / "run")
session.export()
assert metrics == json.loads((here / "run" / "metrics.json").read_text())
assert set(metrics["validation"]) == {"mae", "loss", "rows"}
best, values = metrics["evaluations"]["best"], {}
for line in map(json.loads, (here / "run" / "log.jsonl").read_text().splitlines()):
    values |= {line["step"]: line["eval_mae"]} if "eval_mae" in line else {}
assert len(values) == 2 and best == min(values, key=values.get), "less is better"
assert json.loads((here / "run" / "verify.json").read_text())["max_abs_diff"] < 1e-4
job = session.prepare()
batch = {name: value.numpy() for name, value in job.collate(list(job.validation)).items()}
truth = torch.tensor(batch.pop("labels"))
onnx = onnxruntime.InferenceSession(str(here / "run" / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
(logits,) = onnx.run(["logits"], batch)
found = (torch.tensor(logits).squeeze(1).exp() - truth).abs().mean()
torch.testing.assert_close(float(found), metrics["validation"]["mae"], rtol=1e-4, atol=1e-5)
write([-1] * len(texts))
try:
    Session(spec).check_data()
except SubspanError as error:
    assert str(error).startswith(f"{spec}:9:") and "expected a whole number from 0" in str(error), error
else:
    raise AssertionError("a count of -1")
"""


def test_a_new_task_is_one_file_and_one_line(tmp_path):
    """In a copy of the package: no other file knows of it."""
    (diff,) = blocks("tasks", "diff")
    before, after = copied(tmp_path, diff)
    table = "rewriter/tasks/__init__.py"
    assert after.keys() - before.keys() == {"rewriter/tasks/count_regression.py"}
    assert {file for file in before if after.get(file) != before[file]} == {table}
    lines = before[table].splitlines()
    added = [line for line in after[table].splitlines() if line not in lines]
    assert added == ['    "count-regression": "CountRegression",']
    assert [line for line in after[table].splitlines() if line not in added] == lines
    run(NEW_TASK, tmp_path, tmp_path, path=(tmp_path, ROOT))
    assert contents(tmp_path) == after


# transforms.md


def test_a_new_method_is_one_file(tmp_path):
    """In a copy of the package: no other file knows of it."""
    (diff,) = blocks("transforms", "diff")
    assert len(diff.splitlines()) <= 20
    before, after = copied(tmp_path, diff)
    assert len(after.keys() - before.keys()) == 1 and all(after[file] == text for file, text in before.items())
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
    run(script, tmp_path, path=(tmp_path,))


def test_the_schedule_that_is_shown(tmp_path):
    """Of 2 x 4 columns half are left, the same ones that the tuned graph had."""
    (code,) = blocks("transforms", "python")
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
    run(script, ROOT)


# library.md


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.fixture
def space(tmp_path, monkeypatch):
    """The variables of the snippet with a loop of one's own, run to its end with one step, and x with its output."""
    monkeypatch.chdir(tmp_path)
    before, after = block("library", "python", "save_adapter").split("...", 1)
    space = {"model": Net(), "x": torch.randn(5, 16)}
    space["frozen"] = space["model"](space["x"]).detach()
    exec(before, space)
    space["tuned"](space["x"]).square().sum().backward()
    space["optimiser"].step()
    space["expected"] = space["tuned"](space["x"]).detach()
    exec(after.partition("\n")[2], space)
    return space


def test_any_module(space):
    assert not torch.allclose(space["expected"], space["frozen"])
    torch.testing.assert_close(space["model"](space["x"]), space["expected"])


def test_several_adapters(space):
    exec(block("library", "python", "tuned.hold"), space)
    tuned, found = space["tuned"], {}
    for name in ("default", "stored", "other"):
        tuned.use(name)
        found[name] = tuned(space["x"]).detach(), set(tuned_parameters(tuned))
    assert list(tuned.adapters) == list(found)
    torch.testing.assert_close(found["stored"][0], space["expected"])
    torch.testing.assert_close(found["default"][0], space["expected"])
    torch.testing.assert_close(found["other"][0], space["frozen"])
    assert found["other"][1] == {"layers.0.weight.full.weight"}


def test_methods_that_choose_and_prune(space):
    space |= {"rows": [torch.randn(16) for _ in range(6)], "collate": torch.stack, "steps": 20}
    space["objective"] = lambda model, x: model(x).square().mean()
    before = space["objective"](space["traced"], torch.stack(space["rows"]))
    exec(block("library", "python", "settle"), space)
    tuned = space["tuned"].eval()
    assert space["objective"](tuned, torch.stack(space["rows"])) < before
    sizes = {name.rpartition(".")[2]: one for name, one in tuned.plan.given.items()}
    assert set(sizes) == {"fish_mask", "adalora"}
    assert tuned.plan.trainable_parameters == sum(p.numel() for p in tuned_parameters(tuned).values())


def test_a_session(tmp_path, capsys):
    spec = tiny.project(tmp_path)
    exec(block("library", "python", "session.cost()").replace("specs/quickstart.yaml", str(spec)), {})
    session = Session(spec)
    found, activations = capsys.readouterr().out.split("\n")[:2]
    assert found == f"512 {session.plan().total_parameters} ()" and int(activations) == session.cost().activations
    spec.write_text(spec.read_text() + "meta: {row: $r}\nvariants: [{values: {r: [1, 2]}, train: {epochs: $r}}]\n")
    exec(block("library", "python", "like=").replace("specs/study/mpc.yaml", str(spec)), {})
    assert capsys.readouterr().out == "1 512\n2 512\n"


def test_every_name_is_exported():
    table = PAGES["library"].partition("## The pieces")[2]
    names = [name for line in table.splitlines()[4:] for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert len(names) > 30 and not set(names) - set(rewriter.__all__)
    calls = set(re.findall(r"`session\.(\w+)\(", PAGES["library"]))
    assert len(calls) > 6 and all(callable(getattr(Session, call)) for call in calls)
