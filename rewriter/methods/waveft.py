"""WaveFT: a change that is sparse in Haar's wavelets."""

import torch
from torch import Tensor

from rewriter.algebra import Operator, Patch
from rewriter.methods.fourierft import drawn
from rewriter.transforms import Count, Peft, Place, Positive, Scope, choice, same, transform


def _haar(places: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """One level of synthesis, of coefficients at places: (..., 2) each, the pair that one is of, and its signs there.
    Means come first, then differences."""
    pair = 2 * (places % half)
    signs = 1 - 2 * (places >= half).long()
    return torch.stack([pair, pair + 1], -1), torch.stack([torch.ones_like(signs), signs], -1)


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
    (rows, up), (columns, across) = _haar(indices // site.m, site.n // 2), _haar(indices % site.m, site.m // 2)
    places = rows.unsqueeze(-1) * site.m + columns.unsqueeze(-2)
    signs = (up.unsqueeze(-1) * across.unsqueeze(-2)).to(d.dtype)
    return Patch(w, places.flatten(-3), (0.5 * scale * d[..., None, None] * signs).flatten(-3))
