"""A change that is sparse in frequency."""

import torch
from torch import Tensor

from rewriter.algebra import Dense, Operator
from rewriter.transforms import Count, Peft, Place, Positive, Scope, choice, same, transform


def drawn(config, at: Place) -> Tensor:
    """Row-major places in W (n, m) that PEFT draws in a stored weight (m, n) from its seed."""
    generator = torch.Generator().manual_seed(config["random_loc_seed"])
    places = torch.randperm(at.n * at.m, generator=generator)[: config["n_frequency"]]
    return places % at.n * at.m + places // at.n


@transform(
    "extension",
    peft=Peft(
        "FOURIERFT",
        {"d": same("fourierft_spectrum")},
        {"frequencies": "n_frequency", "scale": "scaling"},
        made={"indices": drawn},
        write=lambda _: {"random_loc_seed": 777},
        ignored=frozenset({"random_loc_seed"}),
        patterns={"n_frequency": "n_frequency_pattern"},
        after_dot=True,
    ),
)
def fourierft(w: Operator, site: Scope, *, frequencies: Count = 1000, scale: Positive = 150.0) -> Operator:
    """W + s Re(F^-1 D), F the two-dimensional Fourier transform and D tuned at random frequencies, 0 at the start.
    arXiv 2405.03003"""
    size = site.n * site.m
    count = min(frequencies, size)
    indices, d = site.chosen("indices", count, choice(size), below=size, distinct=True), site.tuned("d", count, 0.0)
    spectrum = d.new_zeros((*site.shape[:-2], size)).scatter(-1, indices, d).unflatten(-1, (site.n, site.m))
    return w + scale * Dense(torch.real(torch.fft.ifft2(spectrum)))
