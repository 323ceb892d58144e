"""Where a change lies: the subspace that a weight spans beside the one that its tuned form spans. Fig. 1"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from ..export.merge import changes
from ..tuned import TunedModel

ENERGY = 0.9  # of ||W||^2: almost every W has full rank, so all of it spans everything
_ZERO = 1e-6  # of the largest singular value


@dataclass(frozen=True)
class Subspace:
    """A weight W (n, m) and phi(W), of which the leading k left singular vectors hold `ENERGY` of ||W||^2.

    Attributes:
        label: of the weight.
        shape: n, m.
        norm: ||phi(W) - W|| over ||W||, Frobenius'.
        rank: of phi(W) - W.
        leading: k.
        angles: the k principal angles between the leading subspaces of W and phi(W), degrees, largest first.
        outside: share of ||phi(W) - W||^2 that is outside W's leading subspace.
        chance: what that share is of a change in no direction at all, (n - k) / n.
    """

    label: str
    shape: tuple[int, int]
    norm: float
    rank: int
    leading: int
    angles: tuple[float, ...]
    outside: float
    chance: float


def subspace(label: str, w: Tensor, change: Tensor) -> Subspace:
    """Of one weight.

    Args:
        w, change: W and phi(W) - W, (n, m), float64.
    """
    u, s = _left(w)
    energy = s.square().cumsum(0) / s.square().sum()
    k = min(int((energy < ENERGY).sum()) + 1, len(s))
    before, after = u[:, :k], _left(w + change)[0][:, :k]
    size = change.square().sum()
    values = _left(change)[1]
    return Subspace(
        label,
        (w.shape[0], w.shape[1]),
        float(size.sqrt() / w.norm()),
        int((values > _ZERO * values[0]).sum()) if size else 0,
        k,
        tuple(np.degrees(subspace_angles(before.numpy(), after.numpy())).tolist()),
        float(1 - (before.T @ change).square().sum() / size) if size else 0.0,
        (w.shape[0] - k) / w.shape[0],
    )


def _left(w: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values, largest first, of a Gram matrix of the smaller side: in float64 exact
    to 1e-8 of the largest, at a tenth of the time."""
    wide = w.shape[0] <= w.shape[1]
    values, vectors = torch.linalg.eigh(w @ w.T if wide else w.T @ w)
    s, vectors = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    return (vectors if wide else w @ vectors / s.clamp_min(1e-300)), s


def subspaces(model: TunedModel) -> Iterator[Subspace]:
    """Of every matrix of the base that is tuned and merges, in the plan's order.

    Args:
        model: from `rewrite` or `load_adapter`, on the CPU.
    """
    for weight, sites, w, change in changes(model, partly=True):
        if not sites[0].layout.vector and w.ndim == 2 and w.any():
            yield subspace(weight, w, change)
