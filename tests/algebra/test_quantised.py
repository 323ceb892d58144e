"""Weights in few bits: how far they are from the dense ones, that they compute as what they mean, and what is kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriter.algebra import Format, Quantised, held_bytes
from rewriter.algebra.quantised import FP8, METHODS

# Bits of a code, and of what a group has beside its codes.
BITS = {"nf4": (4, 32), "int4": (4, 32 + 8), "int8": (8, 32), "fp8": (8, 32)}
FORMS = [Format(method, group) for method in (*METHODS, FP8) for group in (32, 64)]
named = {"ids": lambda one: f"{one.method}-{one.group}"}


def weight(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (0.05 * torch.randn(*(shape or (48, 128)), generator=generator)).to(dtype)


def test_every_method_is_tried():
    assert set(BITS) == {*METHODS, FP8}


@pytest.mark.parametrize("form", FORMS, **named)
def test_bytes(form):
    code, more = BITS[form.method]
    w = weight()
    assert held_bytes(Quantised.of(w, form)) == w.numel() * (code + more / form.group) / 8


@pytest.mark.parametrize("group", [32, 64])
def test_whole_numbers_are_within_half_a_step(group):
    """int4 moves by its zero point, which is rounded too: where zero lies between two steps, by a whole one."""
    w = weight()
    groups = w.unflatten(-1, (-1, group))
    for method, least, steps in (("int8", 0.5, groups.abs().amax(-1) / 127), ("int4", 1.0, None)):
        if steps is None:
            steps = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 15
        far = (Quantised.of(w, Format(method, group)).dense() - w).unflatten(-1, (-1, group)).abs().amax(-1)
        assert (far <= (least + 1e-5) * steps).all() and (far > 0).all()


@pytest.mark.parametrize("group", [32, 64])
def test_normal_floats_are_those_of_bitsandbytes(group):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight()
    codes, state = functional.quantize_4bit(w, blocksize=group, quant_type="nf4")
    torch.testing.assert_close(Quantised.of(w, Format("nf4", group)).dense(), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS, **named)
def test_products_and_gradients_are_those_of_what_it_means(form, dtype):
    """Bit for bit, and what the backward keeps of the weight is its codes."""
    own = nn.Parameter(Quantised.of(weight(dtype=dtype), form), requires_grad=False)
    plain, x, bias = own.dense(), weight(3, 5, 128, dtype=dtype).requires_grad_(), weight(48, dtype=dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: (kept.append(one), one)[1], lambda one: one):
        y = F.linear(x, own, bias)
    z = F.linear(x, plain, bias)
    assert torch.equal(y, z) and [type(one) for one in kept] == [Quantised]
    for found, expected in zip(*(torch.autograd.grad(one.square().sum(), x) for one in (y, z)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("form", FORMS, **named)
def test_what_is_quantised_again_stays(form):
    once = Quantised.of(weight(), form).dense()
    torch.testing.assert_close(Quantised.of(once, form).dense(), once, rtol=0, atol=1e-6)


def test_groups_of_zeros_stay_zero():
    for form in FORMS:
        assert not Quantised.of(torch.zeros(2, 128), form).dense().any()


@pytest.mark.parametrize("form", FORMS, **named)
def test_rows_are_read_without_the_others(form):
    table, experts = Quantised.of(weight(), form), Quantised.of(weight(3, 16, 64), form)
    rows = torch.tensor([[5, 0], [47, 5]])
    assert torch.equal(F.embedding(rows, table), F.embedding(rows, table.dense()))
    assert torch.equal(table.index_select(0, rows[0]), table.dense().index_select(0, rows[0]))
    for one, same in (
        (table[3:9], table.dense()[3:9]),
        (experts[1], experts.dense()[1]),
        (table.t(), table.dense().t()),
    ):
        assert isinstance(one, Quantised) and torch.equal(one.dense(), same)
    assert torch.equal(table.t()[3:9], table.dense().t()[3:9]) and torch.equal(table[3], table.dense()[3])
    assert torch.equal(experts[torch.tensor([2, 0])], experts.dense()[torch.tensor([2, 0])])


def test_nothing_writes_to_it():
    own = Quantised.of(weight(), FORMS[0])
    with pytest.raises(NotImplementedError, match="would write"):
        own.add_(1)


def test_a_module_moves_with_it():
    layer = nn.Linear(128, 48, bias=False)
    layer.weight = nn.Parameter(Quantised.of(weight(), FORMS[-1]), requires_grad=False)
    assert type(layer.weight.to(torch.float64)) is torch.Tensor
    layer.to("meta")
    assert isinstance(layer.weight, Quantised) and layer.weight.codes.is_meta
    assert layer(torch.empty(2, 128, device="meta")).shape == (2, 48)
