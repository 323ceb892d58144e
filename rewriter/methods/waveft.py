"""WaveFT: a change that is sparse in Haar's wavelets."""

import torch
from torch import Tensor

from rewriter.algebra import Dense, Operator
from rewriter.transforms import Count, Positive, Scope, choice, transform


def _haar(x: Tensor) -> Tensor:
    """One level of synthesis along the rows: means and differences of pairs, to the pairs."""
    half = x.shape[-2] // 2
    mean, difference = x[..., :half, :], x[..., half:, :]
    return torch.stack([mean + difference, mean - difference], -2).flatten(-3, -2) / 2**0.5


@transform("extension")
def waveft(w: Operator, site: Scope, *, coefficients: Count = 1000, scale: Positive = 25.0) -> Operator:
    """W + s H D Ht, H Haar's wavelets of one level and D tuned at random places, 0 at the start. arXiv 2505.12532"""
    size = 4 * site.divided(2) * site.divided(2, "outputs")
    count = min(coefficients, size)
    indices, d = site.chosen("indices", count, choice(size), below=size, distinct=True), site.tuned("d", count, 0.0)
    sparse = d.new_zeros((*site.shape[:-2], size)).scatter(-1, indices, d).unflatten(-1, (site.n, site.m))
    return w + scale * Dense(_haar(_haar(sparse).transpose(-2, -1)).transpose(-2, -1))
