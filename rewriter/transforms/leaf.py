"""Leaves: the tensors that a transform declares at a site, and their start values."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Initial = float | Tensor | Callable[[tuple[int, ...], torch.Generator], Tensor]


class SvdFactor(str):
    """Start value of a constant: the named factor (u, s or vt) of the weight's singular value decomposition."""


@dataclass(frozen=True)
class Leaf:
    """A tensor that a transform declares.

    Attributes:
        role: "tuned"; "constant", computed from the frozen weight or drawn alike everywhere; or "chosen", what a
            schedule or a draw decides and the adapter keeps (indices, as a rule).
        rate: its learning rate over the run's.
        dtype: of a chosen one; others have the weight's, float32 or wider.
        replaces: it stands in the weight's place, so that nothing of the weight is left in the result.
        below: of a chosen one, what its entries are smaller than; they are 0 or more then.
        distinct: whether the entries of a chosen one differ from each other, in every matrix of a batch.
    """

    name: str
    shape: tuple[int, ...]
    initial: Initial
    role: str = "tuned"
    rate: float = 1.0
    dtype: torch.dtype | None = None
    replaces: bool = False
    below: int | None = None
    distinct: bool = False

    def empty(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of its shape, in its own type or else `dtype`."""
        return torch.empty(self.shape, device=device, dtype=self.dtype or dtype)


def initial_value(leaf: Leaf, seed: int, svd: Callable[[], dict[str, Tensor]]) -> Tensor:
    """The start value of a leaf, on the CPU or where its value was computed; float32 where it is drawn.

    The generator is seeded by the seed and the leaf's name, so a value does not depend on the order of the sites.

    Args:
        svd: the weight's decomposition, as `decompose`.

    Raises:
        SpecError: a leaf that a schedule has to choose first.
    """
    initial = leaf.initial
    if isinstance(initial, SvdFactor):
        return svd()[str(initial)]
    if isinstance(initial, Tensor):
        return initial.detach().clone()
    if callable(initial):
        key = f"{seed}:{leaf.name}" if leaf.role != "constant" else ".".join(leaf.name.split(".")[-2:])
        digest = hashlib.sha256(key.encode()).digest()
        return initial(leaf.shape, torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))
    return torch.full(leaf.shape, float(initial))


def decompose(weight: Tensor) -> dict[str, Tensor]:
    """Thin singular value decomposition of (..., n, m), in float32 or wider.

    Signs are fixed (the largest entry of every left vector is positive), so that a run elsewhere sees the same factors.
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    u, s, vt = torch.linalg.svd(wide, full_matrices=False)
    peak = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(u.dtype)
    return {"u": u * sign, "s": s, "vt": vt * sign.transpose(-2, -1)}
