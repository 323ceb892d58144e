"""TinyLoRA: a handful of numbers for a whole weight."""

from dataclasses import replace

import torch
from torch import Tensor

from rewriter.algebra import Dense, Diag, Operator
from rewriter.transforms import Count, Peft, Place, Rank, Scope, Stored, decompose, normal, same, transform

_SAME = 1e-3  # of the singular vectors; float32's rounding over their gaps


def _factors(at: Place) -> dict[str, Tensor]:
    """(r, n) Sr^(1/2) Ur^t and (m, r) Vr Sr^(1/2)."""
    parts, rank = decompose(at.weight), min(at.options.rank, at.n, at.m)
    root = parts["s"][:rank].sqrt()
    return {"tinylora_A": (parts["u"][:, :rank] * root).mT, "tinylora_B": parts["vt"][:rank].mT * root}


def _turned(value: Tensor, at: Place) -> Tensor:
    """P_i transposed, in our singular vectors; theirs have other signs."""
    ours, theirs = _factors(at)["tinylora_A"], at.further["tinylora_A"]
    signs = (ours * theirs.to(ours)).sum(1, keepdim=True).sign() if ours.shape == theirs.shape else ours.new_zeros(1, 1)
    if not signs.all() or (ours * signs - theirs.to(ours)).norm() > _SAME * ours.norm():
        raise ValueError("tinylora_A is not of the weight's singular vectors: is it of another base?")
    return (signs * value.to(ours) * signs.mT).mT


@transform(
    "extension",
    peft=Peft(
        "TINYLORA",
        {
            "v": replace(same("tinylora_v"), ending=lambda _, number: str(number)),
            "p": Stored("tinylora_P", _turned, lambda value, _: value.mT),
        },
        {"rank": "r", "numbers": "u"},
        fixed={"weight_tying": (0.0,), "save_projection": (True,)},
        ignored=frozenset({"projection_seed", "init_v_bound"}),
        further=("tinylora_A", "tinylora_B"),
        beside=_factors,
    ),
)
def tinylora(w: Operator, site: Scope, *, rank: Rank = 2, numbers: Count = 64) -> Operator:
    """W + Ur Sr^(1/2) (sum_i v_i P_i) Sr^(1/2) Vrt, P_i (r, r) random and frozen; v = 0 at the start.
    arXiv 2602.04118"""
    u, s, vt = site.svd()
    root = Diag(s[..., :rank].sqrt())
    p = site.frozen("p", (numbers, rank, rank), normal(rank**-0.5), apart=True)
    r = torch.einsum("...i,...ijk->...jk", site.tuned("v", numbers, 0.0), p)
    return w + Dense(u[..., :rank]) @ root @ Dense(r) @ root @ Dense(vt[..., :rank, :])
