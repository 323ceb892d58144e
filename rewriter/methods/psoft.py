"""PSOFT: an orthogonal map, with lengths, inside the principal subspace."""

import torch
from torch import Tensor

from rewriter.algebra import Dense, Diag, Identity, Operator
from rewriter.methods.rotations import cayley
from rewriter.transforms import Peft, Place, Rank, Scope, Stored, decompose, same, transform


def _turned(value: Tensor, at: Place) -> Tensor:
    """Upper triangle (1, r (r - 1) / 2) of Q in the singular basis with the other's signs: PEFT has LAPACK's own."""
    rank, wide = at.options.rank, at.weight.float()
    theirs = torch.linalg.svd(wide.mT, full_matrices=False)[2][:rank]
    signs = (theirs.mT * decompose(wide)["u"][:, :rank]).sum(0).sign()
    rows, columns = torch.triu_indices(rank, rank, 1)
    return value.reshape(1, -1) * (signs[rows] * signs[columns]).to(value.dtype)


@transform(
    "combination",
    peft=Peft(
        "PSOFT",
        {
            "q": Stored("psoft_R.weight", _turned, lambda value, at: _turned(value, at)[0]),
            "a": same("psoft_R.vector_a"),
            "b": same("psoft_R.vector_b"),
        },
        {"rank": "r"},
        write=lambda options: {"psoft_alpha": options.rank},
        fixed={
            "use_cayley_neumann": (False,),
            "ab_svd_init": ("psoft_init",),
            "psoft_svd": ("full",),
            "psoft_orth": (True,),
            "psoft_mag_a": (True,),
            "psoft_mag_b": (True,),
        },
        ignored=frozenset(
            {
                "psoft_alpha",
                "psoft_svd_lowrank_niter",
                "random_seed",
                "num_cayley_neumann_terms",
                "cayley_neumann_eps",
            }
        ),
    ),
)
def psoft(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """W + Ur (Diag(a) R Diag(b) - I) Sr Vrt, R = Cayley(Q) orthogonal; a = b = 1, Q = 0 at the start.
    openreview FSHrinMArK"""
    u, s, vt = site.svd()
    rotation = Dense(cayley(site, 1, rank)[..., 0, :, :])
    turned = Diag(site.tuned("a", rank, 1.0)) @ rotation @ Diag(site.tuned("b", rank, 1.0))
    return w + Dense(u[..., :rank]) @ (turned - Identity()) @ Diag(s[..., :rank]) @ Dense(vt[..., :rank, :])
