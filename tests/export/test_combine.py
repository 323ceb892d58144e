"""Arithmetic on changes: sums are linear, TIES is PEFT's, DARE keeps its expectation."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.merge_utils import ties

from pipelines import combine as combining
from rewriter.export.combine import HOWS, combined


def some(seed, n=6, m=5, names=("a", "b")):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, m, generator=generator, dtype=torch.float64) for name in names}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.floats(-2, 2), st.floats(-2, 2))
def test_sums_are_linear_and_a_run_taken_away_leaves_nothing(seed, p, q):
    one, other = some(seed), some(seed + 100, names=("b", "c"))
    made = combined([one, other], [p, q])
    # One rounding of each of two products and a sum: 1e-14 of numbers of this size.
    torch.testing.assert_close(made["b"], p * one["b"] + q * other["b"], rtol=0, atol=1e-14)
    torch.testing.assert_close(made["c"], q * other["c"], rtol=0, atol=0)
    assert not any(value.any() for value in combined([one, one], [p, -p]).values())


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("runs", [1, 2, 5])
def test_ties_is_peft_s(density, runs):
    """Of one weight, since PEFT counts the share in each tensor and we, as the paper, in all of a run together."""
    parts = [some(seed, 20, 10, ("a",))["a"] for seed in range(runs)]
    found = combined([{"a": part} for part in parts], [0.7] * runs, "ties", density)["a"]
    torch.testing.assert_close(found, ties(parts, torch.full((runs,), 0.7), density), rtol=1e-6, atol=1e-6)


def test_ties_keeps_the_largest_of_all_weights_together():
    change = {"a": torch.tensor([1.0, -9.0]), "b": torch.tensor([8.0, 2.0])}
    made = combined([change], [1.0], "ties", 0.5)
    assert made["a"].tolist() == [0.0, -9.0] and made["b"].tolist() == [8.0, 0.0]


def test_a_sign_is_elected_and_the_mean_is_of_those_that_have_it():
    runs = [
        {"a": torch.tensor([4.0, 1.0, 0.0])},
        {"a": torch.tensor([2.0, 1.0, 3.0])},
        {"a": torch.tensor([-5.0, -3.0, 0.0])},
    ]
    assert combined(runs, [1.0, 1.0, 1.0], "ties", 1.0)["a"].tolist() == [3.0, -3.0, 3.0]
    assert combined(runs, [1.0, 1.0, -1.0], "ties", 1.0)["a"].tolist() == pytest.approx([11 / 3, 5 / 3, 3.0])


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_dare_keeps_a_share_and_its_expectation(how):
    change = {"a": torch.ones(400, 500)}
    made = combined([change], [1.0], how, 0.25, seed=3)["a"]
    assert set(made.unique().tolist()) == {0.0, 4.0}
    assert abs(float(made.mean()) - 1.0) < 0.02  # 5 standard errors of 200,000 draws are 0.019
    assert combined([change], [1.0], how, 0.25, seed=3)["a"].equal(made)
    assert not combined([change], [1.0], how, 0.25, seed=4)["a"].equal(made)


def test_the_command_offers_what_there_is():
    assert get_args(combining.How) == HOWS


@pytest.mark.parametrize("how", HOWS)
def test_all_of_one_run_is_the_run(how):
    one = some(1)
    for name, value in combined([one], [1.0], how, 1.0).items():
        assert value.equal(one[name])
