"""Changes of weights as low-rank terms: exact where the rank is bounded, nearest on the layer's inputs elsewhere."""

import itertools

import pytest
import torch

from rewriter import Rule, SubspanError, plan, rewrite, tuned_parameters
from rewriter.export.low_rank import Seen, as_low_rank, look, nearest
from tests.architectures import inputs_of, traced

LINEAR = "bert.encoder.layer.*.{attention.self.{query,value},intermediate.dense}.weight"
# Transform -> the bound of its change's rank.
BOUNDED = {
    "lora": ({"rank": 3}, 3), "lora_xs": ({"rank": 3}, 3),
    "vera": ({"rank": 3}, 3), "tied_lora": ({"rank": 3}, 3), "miss": ({"rank": 3}, 3), "delora": ({"rank": 3}, 3),
    "pissa": ({"rank": 2}, 4), "gralora": ({"rank": 4}, 8), "hra": ({"rank": 4}, 4), "psoft": ({"rank": 4}, 4),
    "deft": ({"rank": 3}, 3),
}  # fmt: skip


def tuned(name, options):
    _, inputs, model = traced("bert")
    found = rewrite(model, plan(model, [Rule(target=LINEAR, apply=[{name: options}])])).eval()
    generator = torch.Generator().manual_seed(0)
    for value in tuned_parameters(found).values():
        value.data += 0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return model, inputs, found


@pytest.mark.parametrize("name", BOUNDED)
def test_a_bounded_change_is_exact(name):
    options, bound = BOUNDED[name]
    model, inputs, one = tuned(name, options)
    other, found = as_low_rank(one, model, None, 0.5, {})
    assert all(how.exact and how.a.shape[1] <= bound for how in found.values())
    batch = inputs_of("bert", inputs, 3, 9)
    torch.testing.assert_close(other.eval()(**batch).logits, one(**batch).logits, rtol=1e-6, atol=1e-6)


def test_more_rank_has_less_error():
    model, inputs, one = tuned("loha", {"rank": 8})
    batch = inputs_of("bert", inputs, 3, 9)
    seen = look(one, model, [batch])
    errors = []
    for rank in (2, 4, 8, 16):
        _, found = as_low_rank(one, model, rank, 0.0, seen)
        errors.append([how.error for how in found.values()])
    assert all(a > b for one in zip(*errors, strict=True) for a, b in itertools.pairwise(one))
    _, found = as_low_rank(one, model, None, 0.2, seen)
    assert all(how.error <= 0.2 for how in found.values())


def test_the_nearest_is_nearer_where_it_counts_than_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = random(200, 12) * torch.logspace(0, -3, 12, dtype=torch.float64)
    g = random(200, 10) * torch.logspace(-3, 0, 10, dtype=torch.float64)
    change, seen = random(12, 10), Seen(x.T @ x / len(x), g.T @ g / len(g))
    for rank in (1, 3, 6):
        a, b, exact, error = nearest(change, seen, rank, 0.0)
        c, d, _, plain = nearest(change, None, rank, 0.0)
        weighted = [(x @ (change - p @ q) @ g.T).norm() / (x @ change @ g.T).norm() for p, q in ((a, b), (c, d))]
        assert not exact and weighted[0] < 0.5 * weighted[1]
        assert float(weighted[0]) == pytest.approx(error, abs=0.1)  # Up to the ridge.
        assert float((change - c @ d).norm() / change.norm()) == pytest.approx(plain, rel=1e-9)


def test_inputs_are_seen_at_real_tokens_of_the_merged_model():
    model, inputs, one = tuned("lora", {"rank": 3})
    batch = inputs_of("bert", inputs, 3, 9)
    alone = {key: value[-1:, : int(batch["attention_mask"][-1].sum())] for key, value in batch.items()}
    padded = {key: value[-1:] for key, value in batch.items()}
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    found, expected = (look(one, model, [rows])[name] for rows in (padded, alone))
    torch.testing.assert_close(found.inputs, expected.inputs, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=1e-9, atol=1e-10)


def test_what_is_no_change_of_a_matrix_is_refused():
    _, _, model = traced("bert")
    for rule, said in (
        (Rule(target="bert.encoder.layer.*.attention.self.query.bias", apply=["bitfit"]), "it is no matrix"),
        (Rule(target="bert.encoder.layer.*", apply=[{"prefix": {"length": 2}}]), "can't merge"),
    ):
        with pytest.raises(SubspanError, match=said):
            as_low_rank(rewrite(model, plan(model, [rule])), model, 2, 0.0, {})
