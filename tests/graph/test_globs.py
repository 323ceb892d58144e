"""Patterns over parameter names, and the layouts that a graph implies."""

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewriter import SpecError, plan, trace
from rewriter.graph.globs import expand_braces, find, match, uneven
from rewriter.graph.weights import layout_of
from rewriter.spec import Rule
from tests.architectures import build

NAMES = ["a.0.q.weight", "a.0.q.bias", "a.0.k.weight", "a.1.q.weight", "a.1.k.weight", "b.weight", "b.c.weight"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.*.q.weight", ["a.0.q.weight", "a.1.q.weight"]),
        ("a.0.q.*", ["a.0.q.weight", "a.0.q.bias"]),
        ("a.{0,1}.{q,k}.weight", ["a.0.q.weight", "a.0.k.weight", "a.1.q.weight", "a.1.k.weight"]),
        ("{a.{0,1}.q,b}.weight", ["a.0.q.weight", "a.1.q.weight", "b.weight"]),
        ("**.weight", ["a.0.q.weight", "a.0.k.weight", "a.1.q.weight", "a.1.k.weight", "b.weight", "b.c.weight"]),
        ("b.**", ["b.weight", "b.c.weight"]),
        ("b.**.weight", ["b.weight", "b.c.weight"]),
        ("*.weight", ["b.weight"]),
        ("a.*.weight", []),
        ("a.0.*.w*t", ["a.0.q.weight", "a.0.k.weight"]),
        ("a.?.q.weight", []),
        ("a.[01].q.weight", []),
    ],
)
def test_match(pattern, expected):
    assert match([pattern], NAMES) == expected


@pytest.mark.parametrize("pattern", ["{a,b", "a}", "{a,{b}", "}{"])
def test_unbalanced_braces(pattern):
    with pytest.raises(ValueError, match="brace"):
        expand_braces(pattern)


@given(st.text(alphabet="ab.*{},", max_size=30))
def test_any_pattern_is_an_answer_or_a_value_error(pattern):
    with contextlib.suppress(ValueError):
        assert set(match([pattern], NAMES)) <= set(NAMES)


def test_hostile_patterns_are_fast():
    started = time.monotonic()
    match(["*a" * 50 + "b"], ["a" * 200])
    match([".".join(["**"] * 60) + ".x"], [".".join(["a"] * 60)])
    with pytest.raises(ValueError, match="alternatives"):
        expand_braces("{a,b}" * 30)
    assert time.monotonic() - started < 10


def test_nothing_matched_lists_the_nearest():
    with pytest.raises(SpecError, match=r"matches no parameter; nearest: a\.0\.q\.weight"):
        find(["a.*.qq.weight"], NAMES, ())


def test_uneven_matches_are_told():
    assert uneven(["a.*.{q,k}.weight"], match(["a.*.{q,k}.weight"], NAMES), NAMES) == []
    (sentence,) = uneven(["a.*.q.*"], match(["a.*.q.*"], NAMES), NAMES)
    assert sentence == "a.*.q.bias is in 1 of 2 layers; not in 1"
    assert uneven(["a.0.q.weight"], ["a.0.q.weight"], NAMES) == []


@pytest.mark.parametrize(
    ("architecture", "weight", "transposed", "shape"),
    [
        ("bert", "bert.encoder.layer.0.intermediate.dense.weight", True, (16, 24)),
        ("bert", "bert.embeddings.word_embeddings.weight", False, (64, 16)),
        ("bert", "bert.encoder.layer.0.intermediate.dense.bias", False, (1, 24)),
        ("gpt2", "transformer.h.0.attn.c_attn.weight", False, (16, 48)),
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj", True, (4, 16, 48)),
        ("mixtral", "model.layers.0.mlp.experts.down_proj", True, (4, 24, 16)),
        ("vit", "vit.embeddings.patch_embeddings.projection.weight", True, (3 * 8 * 8, 16)),
    ],
)
def test_layouts(architecture, weight, transposed, shape):
    """W is presented as (inputs, outputs), however it is stored."""
    model, inputs = build(architecture, meta=True)
    graph = trace(model, inputs, modes=("eval",))
    (site,) = plan(graph, [Rule(target=weight, apply=["full"])]).sites
    assert site.layout.transposed == transposed and site.shape == shape
    assert layout_of((3,), []).shape == (1, 3)


def test_a_shared_projection_has_several_consumers():
    from rewriter.graph.weights import uses

    model, inputs = build("deberta-v2", meta=True)
    graph = trace(model, inputs, modes=("eval",)).graphs["eval"]
    assert len(uses(graph, ["deberta.encoder.layer.0.attention.self.key_proj.weight"])) == 2
