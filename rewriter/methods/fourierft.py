"""A change that is sparse in frequency."""

import torch

from rewriter.algebra import Dense, Operator
from rewriter.transforms import Count, Positive, Scope, choice, transform


@transform("extension")
def fourierft(w: Operator, site: Scope, *, frequencies: Count = 1000, scale: Positive = 150.0) -> Operator:
    """W + s Re(F^-1 D), F the two-dimensional Fourier transform and D tuned at random frequencies, 0 at the start.
    arXiv 2405.03003"""
    size = site.n * site.m
    count = min(frequencies, size)
    indices, d = site.chosen("indices", count, choice(size), below=size, distinct=True), site.tuned("d", count, 0.0)
    spectrum = d.new_zeros((*site.shape[:-2], size)).scatter(-1, indices, d).unflatten(-1, (site.n, site.m))
    return w + scale * Dense(torch.real(torch.fft.ifft2(spectrum)))
