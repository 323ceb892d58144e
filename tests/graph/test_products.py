"""Products of steps in float64: what they give, and their gradients by finite differences."""

import pytest
import torch
from torch.autograd import gradcheck

from rewriter.graph.products import LEAST, linear_and, product_again, scaled_again

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR).requires_grad_()


@pytest.mark.parametrize("offset", [None, drawn(7)])
@pytest.mark.parametrize("least", [0.5, 0.1 * LEAST, 0.0])
def test_a_sum_that_is_scaled(least, offset):
    x, weight, y, factor, scale = drawn(2, 3, 5), drawn(7, 5), drawn(2, 3, 4), drawn(4, 7), drawn(1, 7)
    scale.data.abs_().add_(0.5)
    scale.data[0, 3] = least

    def function(x, weight, y, factor, scale):
        return linear_and(x, weight, None, [(y, factor)], [0.7], scale, offset)

    expected = (x @ weight.T + 0.7 * y @ factor) * scale + (0 if offset is None else offset)
    torch.testing.assert_close(function(x, weight, y, factor, scale), expected, rtol=1e-12, atol=1e-12)
    assert gradcheck(function, (x, weight, y, factor, scale))


def test_a_sum_with_a_bias():
    x, weight, bias, y, factor = drawn(3, 5), drawn(7, 5), drawn(7), drawn(3, 4), drawn(4, 7)
    found = linear_and(x, weight, bias, [(y, factor), (y, factor)], [1.0, 2.0])
    torch.testing.assert_close(found, x @ weight.T + bias + 3 * y @ factor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("function", "shape"), [(product_again, (3, 5)), (scaled_again, (5,)), (scaled_again, (1, 5))])
def test_an_operand_that_is_computed_again(function, shape):
    source, factor = drawn(2, 4, 5), drawn(*shape)
    plain = (lambda x, f: x @ f.T) if function is product_again else (lambda x, f: x * f)
    made = lambda source, factor: function(torch.tanh, source.tanh(), factor, source)  # noqa: E731
    expected = plain(source.tanh(), factor)
    torch.testing.assert_close(made(source, factor), expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(one.square().sum(), (source, factor)) for one in (made(source, factor), expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
