"""The picture of a layer: what is frozen, what is inserted and of which class, and that boxes don't overlap."""

import xml.etree.ElementTree as ET

import pytest

from rewriter import Rule, SubspanError, plan, rewrite
from rewriter.report.picture import COLOURS, layer_of, picture, to_dot, to_mermaid, to_svg
from tests.architectures import ARCHITECTURES, traced

pytestmark = pytest.mark.xdist_group("architectures")

CASES = [
    ("bert", "{query,value}", [{"lora": {"rank": 2}}], "extension", 2 * 2),
    ("bert", "{query,value}", ["ssb"], "reconstruction", 2 * 2),
    ("bert", "query", ["ssb", {"lora": {"rank": 2}}], "combination", 2 + 2),
    ("llama", "", [{"hadapter": {"bottleneck": 2}}], "extension", None),
    ("t5", "", [{"prefix": {"length": 3}}], "reconstruction", None),
]
LAYERS = {"bert": "bert.encoder.layer", "llama": "model.layers", "t5": "encoder.block"}


def drawn(name, part, chain):
    _, _, graph = traced(name)
    target = f"{LAYERS[name]}.*" + (f".attention.self.{part}.weight" if part else "")
    found = plan(graph, [Rule(target=target, apply=chain)])
    module = layer_of(graph.graphs["eval"], found, 1)
    assert module == f"{LAYERS[name]}.1"
    return [picture(graph, found, module, "a < b"), picture(rewrite(graph, found), found, module, "after")]


@pytest.mark.parametrize(("name", "part", "chain", "kind", "count"), CASES, ids=[f"{c[0]}-{c[3]}" for c in CASES])
def test_inserted_nodes_have_their_class(name, part, chain, kind, count):
    before, after = drawn(name, part, chain)
    assert {one for _, _, one in before.nodes} == {"frozen", "input"}
    classes = [one for _, _, one in after.nodes]
    assert set(classes) == {"frozen", "input", kind}
    assert count is None or classes.count(kind) == count
    assert classes.count("frozen") == [one for _, _, one in before.nodes].count("frozen")
    for one in (before, after):
        keys = {key for key, _, _ in one.nodes}
        assert len(keys) == len(one.nodes) and all({start, end} <= keys for start, end in one.edges)
    root = ET.fromstring(to_svg([before, after]))
    fills = [rect.get("fill") for rect in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert fills.count(COLOURS[kind]) == classes.count(kind) + 1
    groups = root.findall("{http://www.w3.org/2000/svg}g")
    assert len(groups) == 2
    for group in groups:
        boxes = [
            [float(rect.get(side)) for side in ("x", "y", "width", "height")]
            for rect in group.findall("{http://www.w3.org/2000/svg}rect")
        ]
        for i, (x, y, w, h) in enumerate(boxes):
            assert all(x + w <= u or u + v <= x or y + h <= s or s + t <= y for u, s, v, t in boxes[:i])
    assert to_dot([before, after]).count("->") == len(before.edges) + len(after.edges)
    mermaid = to_mermaid([before, after])
    assert mermaid.count("-->") == len(before.edges) + len(after.edges) and "a &lt; b" in mermaid


def test_names_of_weights_and_leaves_are_in_the_ops():
    _, after = drawn("bert", "query", [{"lora": {"rank": 2}}])
    texts = [text for _, text, _ in after.nodes]
    assert ("linear", "attention.self.query.weight") in texts
    assert any(text[1:] == ("attention.self.query.weight.lora.a",) for text in texts)


def test_no_such_layer():
    _, _, graph = traced("bert")
    found = plan(graph, [Rule(target=ARCHITECTURES["bert"].linear, apply=["ssb"])])
    with pytest.raises(SubspanError, match="--layer 2: the model has no such layer"):
        layer_of(graph.graphs["eval"], found, 2)
