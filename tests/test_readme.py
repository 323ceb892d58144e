"""What README shows, run; and that every page of the documentation can be reached from it."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from rewriter import TRANSFORMS, Spec, SubspanError
from tests import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
(QUICKSTART,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = {file: file.read_text() for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def test_it_is_read_in_five_minutes():
    assert len(README.splitlines()) <= 150
    assert f"{len(TRANSFORMS)} methods" in README


def test_the_spec_is_the_quickstart():
    block = README[README.index("## A spec") :].split("\n\n")[1]
    shown = yaml.safe_load(block)
    assert shown == yaml.safe_load((ROOT / "specs" / "quickstart.yaml").read_text())
    Spec.model_validate(shown)


def quickstart(spec, run):
    """README's statements, on another spec and folder."""
    assert QUICKSTART.count('"specs/quickstart.yaml"') == QUICKSTART.count('"runs/notebook"') == 1
    return QUICKSTART.replace("specs/quickstart.yaml", str(spec)).replace("runs/notebook", str(run))


def test_the_library_s_quickstart_is_five_statements(tmp_path):
    assert len(ast.parse(QUICKSTART).body) == 5
    run, space = tmp_path / "run", {}
    exec(quickstart(tiny.project(tmp_path), run), space)
    written = {"spec.yaml", "plan.json", "log.jsonl", "metrics.json", "predictions.safetensors", "verify.json"}
    written |= {"export.json"}
    written |= {"checkpoints", ".subspan-run", ".subspan-lock"}
    assert {file.name for file in run.iterdir()} == written | {"adapter", "merged", "onnx"}
    assert space["session"].run == run


@pytest.mark.parametrize(
    ("right", "wrong", "place", "message"),
    [
        ("rank: 4", "rank: 400", "14:27", "rank 400 is larger than bert.encoder.layer.0.attention.self.query.weight"),
        ("rank: 4", "rnak: 4", "14:21", "unknown key 'rnak'; did you mean 'rank'?"),
        ("label: label", "label: lable", "10:32", "no column 'lable'"),
    ],
)
def test_its_mistakes_have_their_place(tmp_path, right, wrong, place, message):
    spec = tiny.project(tmp_path)
    spec.write_text(spec.read_text().replace(right, wrong))
    with pytest.raises(SubspanError) as caught:
        exec(quickstart(spec, tmp_path / "run"), {})
    assert str(caught.value).startswith(f"{spec}:{place}: ") and message in str(caught.value)
    assert not (tmp_path / "run").exists()


def links(page):
    """The pages' and files' own links: (file, anchor)."""
    for target in LINK.findall(PAGES[page]):
        if not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            yield (page.parent / file).resolve() if file else page, anchor


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for file, anchor in links(page):
        assert file.exists(), file
        assert not anchor or anchor in anchors(PAGES[file]), f"{file}#{anchor}"


def test_every_page_is_found_from_here():
    found, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        found.add(page)
        left += [file for file, _ in links(page) if file in PAGES and file not in found]
    assert found == set(PAGES)
