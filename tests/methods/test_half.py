"""Methods on weights in bfloat16: what they compute has the weight's type."""

import pytest
import torch
from torch import nn

from rewriter import Inputs, Rule, plan, rewrite, trace, tuned_parameters
from rewriter.plan import transformed
from rewriter.tuned import adapter_tensors
from tests.test_rewrite import MATRIX, name_of


@pytest.mark.parametrize("chain", MATRIX, ids=map(name_of, MATRIX))
def test_outputs_gradients_and_merged_weights_have_the_type_of_the_weight(chain):
    """What is formed is what is applied: 16 products of 8 bits of fraction are 0.03 of the output's norm at most."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 16, bias=False)).to(dtype)
    x = torch.randn(5, 16, dtype=dtype)
    traced = trace(model, Inputs(args=(x,)))
    found = plan(traced, [Rule(target="0.weight", apply=chain)])
    tuned = rewrite(traced, found)
    for p in tuned_parameters(tuned).values():
        p.data += 0.02 * torch.randn_like(p)
    out = tuned(x)
    out.square().sum().backward()
    assert out.dtype == dtype and out.isfinite().all()
    for name, p in tuned_parameters(tuned).items():
        assert p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all(), name
    tensors, (site, *more) = adapter_tensors(tuned), found.sites
    tensors = {name: one.to(dtype) if one.is_floating_point() else one for name, one in tensors.items()}
    lookup = lambda _, leaf: tensors[leaf.name]  # noqa: E731
    weight = model[0].weight.detach()
    formed = site.layout.restore(transformed([site, *more], weight, lookup, True, []).dense())
    assert formed.dtype == dtype
    expected = (x.float() @ formed.float().T).tanh() @ model[2].weight.float().T
    found = tuned.eval()(x).detach().float()
    assert float((found - expected).norm() / expected.norm()) < 0.03
