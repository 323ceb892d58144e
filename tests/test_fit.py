"""Fits: the nearest phi(W) of a method to a fine-tuned weight; closed forms, falling errors, what is chosen."""

import copy

import pytest
import torch

from rewriter import SubspanError
from rewriter.fit import as_tuned, candidates, change, cheapest, fit, total_error
from tests.architectures import inputs_of, traced

LINEAR = ("attention.self.query.weight", "intermediate.dense.weight")


@pytest.fixture(scope="module")
def case():
    """A base, a copy in which some matrices, a bias and a table changed, and the difference."""
    model, inputs, graph = traced("bert")
    tuned, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for name, p in tuned.named_parameters():
        if name.endswith((*LINEAR, "query.bias", "word_embeddings.weight")):
            p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return graph, inputs, tuned, change(graph, tuned)


def made(case, methods, ranks=(2, 4)):
    graph, _, _, changed = case
    pairs = list(candidates(graph, sorted(changed.matrices), methods, ranks))
    return [(one, fit(one, changed)) for one, _ in pairs if one], [said for one, said in pairs if not one]


def test_what_changed_is_found(case):
    *_, changed = case
    assert len(changed.matrices) == 4 and list(changed.left) == ["bert.embeddings.word_embeddings.weight"]
    assert sorted(changed.whole) == [f"bert.encoder.layer.{i}.attention.self.query.bias" for i in range(2)]


def test_low_rank_terms_are_the_truncated_decomposition(case):
    *_, changed = case
    for one, found in made(case, ["lora"], (1, 3, 8))[0]:
        for weight, (w, target) in changed.matrices.items():
            s = torch.linalg.svdvals(target - w)
            expected = s[one.options["rank"] :].norm() / s.norm()
            assert found.errors[weight] == pytest.approx(float(expected), abs=1e-9)


def test_scaling_has_its_closed_form(case):
    """Each column of W times the number for which it is nearest to that of W*: linear least squares."""
    *_, changed = case
    ((_, found),), _ = made(case, ["ia3"])
    for weight, (w, target) in changed.matrices.items():
        scale = (w * target).sum(0) / w.square().sum(0)
        expected = (w * scale - target).norm() / (target - w).norm()
        assert found.errors[weight] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", ["lora", "adamss", "miss"])
def test_a_narrow_weight_has_the_rank_that_it_can_have(case, name):
    places = {"bert.encoder.layer.0.attention.self.query.weight": 4, "classifier.weight": 2}
    ((one, _),) = candidates(case[0], list(places), [name], [4])
    assert {place: one.sites[place].chain[0][1].rank for place in places} == places


@pytest.mark.parametrize("name", ["lora", "dora", "hra", "trilora", "miss", "pissa", "hira", "glora"])
def test_errors_fall_with_the_rank(case, name):
    *_, changed = case
    errors = [total_error(found.errors, changed) for _, found in made(case, [name], (2, 4, 8))[0]]
    assert len(errors) == 3 and errors[0] > errors[1] > errors[2] and errors[0] < 1


def test_what_tunes_every_entry_is_exact(case):
    ((_, found),), _ = made(case, ["full"])
    assert max(found.errors.values()) < 1e-6


def test_what_is_chosen_is_the_cheapest_within_the_error(case):
    graph, inputs, tuned, changed = case
    found, left = made(case, ["lora", "ssb", "full", "tied_lora", "adalora", "prefix"], (2, 12))
    assert [said.split(":")[0].split("(")[0] for said in left] == [
        "tied_lora",
        "tied_lora",
        "adalora",
        "adalora",
        "prefix",
    ]
    chosen = cheapest(found, changed, 0.3)
    for weight, i in chosen.items():
        within = [k for k, (_, one) in enumerate(found) if one.errors[weight] <= 0.3]
        assert found[i][1].parameters[weight] == min(found[k][1].parameters[weight] for k in within)
    assert all(found[i][1].errors[weight] < 1e-6 for weight, i in cheapest(found, changed, 0.0).items())
    model = as_tuned(graph, changed, found, cheapest(found, changed, 0.0)).eval()
    batch = inputs_of("bert", inputs, 3, 9)
    with torch.no_grad():
        tuned.bert.embeddings.word_embeddings.weight.copy_(
            graph.get_parameter("bert.embeddings.word_embeddings.weight")
        )
    torch.testing.assert_close(model(**batch).logits, tuned(**batch).logits, rtol=1e-6, atol=1e-6)


def test_another_base_is_refused(case):
    graph = case[0]
    other = copy.deepcopy(case[2])
    other.bert.encoder.layer[0].attention.self.query.weight.data = torch.zeros(3, 3)
    with pytest.raises(SubspanError, match="it is of another base"):
        change(graph, other)
