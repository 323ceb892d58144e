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
    return w + scale * Dense(_real(indices, d, site.n, site.m))


def _real(indices: Tensor, d: Tensor, n: int, m: int) -> Tensor:
    """Re(F^-1 D), (..., n, m), by half of its columns: another one's transform has the real part of its mirror's. In
    float32 or wider."""
    rows, columns, width = indices // m, indices % m, m // 2 + 1
    mirrored = columns >= width
    rows, columns = torch.where(mirrored, -rows % n, rows), torch.where(mirrored, m - columns, columns)
    values = torch.where(2 * columns % m == 0, d, d / 2)  # All but the first and the middle one count twice.
    half = d.new_zeros((*d.shape[:-1], n * width)).scatter_add(-1, rows * width + columns, values)
    wide = half.unflatten(-1, (n, width)).to(torch.promote_types(d.dtype, torch.float32))
    return torch.fft.irfft2(wide, (n, m)).to(d.dtype)
