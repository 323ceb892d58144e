"""Angles, shares and ranks of changes that are known beforehand, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.report.subspaces import ENERGY, subspace
from rewriter.report.subspaces import _left as left


def weight(n=12, m=8, leading=3, seed=0):
    """Singular values 10 of `leading` vectors and 0.1 of the others: the leading ones hold more than 90 %."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q for size in (n, m))
    s = torch.full((min(n, m),), 0.1, dtype=torch.float64)
    s[:leading] = 10
    return u[:, : len(s)] * s @ v[:, : len(s)].T, u, v


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(0.001, 80), st.sampled_from([(12, 8), (8, 12), (8, 8)]))
def test_a_vector_that_is_turned_gives_that_angle(seed, degrees, shape):
    w, u, v = weight(*shape, seed=seed)
    angle = math.radians(degrees)
    change = 10 * torch.outer((math.cos(angle) - 1) * u[:, 0] + math.sin(angle) * u[:, 7], v[:, 0])
    found = subspace("w", w, change)
    # A singular value of 0.1 behind one of 10 turns the leading vectors by up to a hundredth of the angle.
    assert found.angles[0] == pytest.approx(degrees, abs=1) and max(found.angles[1:]) < 1e-3
    assert found.leading == 3 and found.rank == 1


def test_a_change_inside_span_w_and_one_outside():
    w, u, v = weight()
    inside, outside = torch.outer(u[:, 1], v[:, 5]), torch.outer(u[:, 9], v[:, 5])
    one, other, both = (subspace("w", w, change) for change in (inside, outside, inside + outside))
    assert one.outside == pytest.approx(0, abs=1e-12) and other.outside == pytest.approx(1) and both.rank == 1
    assert both.outside == pytest.approx(0.5) and both.chance == pytest.approx(9 / 12)
    assert one.norm == pytest.approx(1 / float(w.norm())) and subspace("w", w, 0.5 * w).angles == pytest.approx([0] * 3)


@pytest.mark.parametrize("rank", [0, 1, 3, 8])
def test_the_rank_of_a_change(rank):
    w, _, _ = weight()
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in (12, 8))
    assert subspace("w", w, a @ b.T).rank == rank


def test_the_leading_vectors_are_those_of_the_decomposition():
    w = torch.randn(40, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, _ = torch.linalg.svd(w, full_matrices=False)
    for found, mirrored in ((left(w), False), (left(w.T.contiguous()), True)):
        torch.testing.assert_close(found[1], s, rtol=1e-8, atol=1e-8)
        assert mirrored or float((found[0][:, :10].T @ u[:, :10]).svd().S.min()) == pytest.approx(1, abs=1e-8)
    k = subspace("w", w, w).leading
    assert s[: k - 1].square().sum() < ENERGY * s.square().sum() <= s[:k].square().sum()
