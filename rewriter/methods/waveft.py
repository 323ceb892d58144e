"""WaveFT: a change that is sparse in Haar's wavelets."""

import torch
from torch import Tensor

from rewriter.algebra import Dense, Operator
from rewriter.methods.fourierft import drawn
from rewriter.transforms import Count, Peft, Place, Positive, Scope, choice, same, transform


def _haar(x: Tensor) -> Tensor:
    """One level of synthesis along the rows: means and differences of pairs, to the pairs."""
    half = x.shape[-2] // 2
    mean, difference = x[..., :half, :], x[..., half:, :]
    return torch.stack([mean + difference, mean - difference], -2).flatten(-3, -2) / 2**0.5


def _drawn(config, at: Place) -> Tensor:
    """PEFT's top right quarter holds the rows' details, ours the columns'."""
    places = drawn(config, at)
    columns, rows = places // at.m, places % at.m
    other = (rows < at.m // 2) != (columns < at.n // 2)
    return (columns + other * (at.n // 2)) % at.n * at.m + (rows + other * (at.m // 2)) % at.m


@transform(
    "extension",
    peft=Peft(
        "WAVEFT",
        {"d": same("waveft_spectrum")},
        {"coefficients": "n_frequency", "scale": "scaling"},
        made={"indices": _drawn},
        fixed={"wavelet_family": ("db1", "haar"), "use_idwt": (True,)},
        write=lambda _: {"random_loc_seed": 777},
        ignored=frozenset({"random_loc_seed"}),
        patterns={"n_frequency": "n_frequency_pattern"},
    ),
)
def waveft(w: Operator, site: Scope, *, coefficients: Count = 1000, scale: Positive = 25.0) -> Operator:
    """W + s H D Ht, H Haar's wavelets of one level and D tuned at random places, 0 at the start. arXiv 2505.12532"""
    size = 4 * site.divided(2) * site.divided(2, "outputs")
    count = min(coefficients, size)
    indices, d = site.chosen("indices", count, choice(size), below=size, distinct=True), site.tuned("d", count, 0.0)
    sparse = d.new_zeros((*site.shape[:-2], size)).scatter(-1, indices, d).unflatten(-1, (site.n, site.m))
    return w + scale * Dense(_haar(_haar(sparse).transpose(-2, -1)).transpose(-2, -1))
