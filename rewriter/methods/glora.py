"""GLoRA: a low-rank scaling of the entries and a low-rank term."""

import torch
from torch import Tensor

from rewriter.algebra import Dense, Hadamard, Operator
from rewriter.transforms import Peft, Place, Rank, Scope, kaiming_uniform, transform, transposed


def _biased(bias: Tensor, at: Place) -> Tensor:
    """b + b D + E + C W, C low-rank, a vector or nothing."""
    own = {name.removeprefix("glora_"): value for name, value in at.further.items()}
    c = own["C.Xd"] @ own["C.Xu"] if "C.Xd" in own else own.get("C.X")
    scaled = bias + bias * own["D.X"].squeeze(-1) + own["E.X"].squeeze(-1) if "D.X" in own else bias
    return scaled if c is None or c.numel() == 1 else scaled + c.squeeze(-1) @ at.weight


@transform(
    "combination",
    peft=Peft(
        "GLORA",
        {
            "a1": transposed("glora_A.Xu"),
            "b1": transposed("glora_A.Xd"),
            "a2": transposed("glora_B.Xu"),
            "b2": transposed("glora_B.Xd"),
        },
        {"rank": "r"},
        fixed={"config_A_B": ("lora",)},
        ignored=frozenset({"config_C", "config_D_E"}),
        write=lambda _: {"config_C": "none", "config_D_E": "vector"},
        further=tuple(
            f"glora_{part}" for part in ("C.X", "C.Xd", "C.Xu", "D.X", "E.X", "C.zeros", "D.zeros", "E.zeros")
        ),
        bias=_biased,
        bias_parts=lambda before, after, _: {"glora_D.X": torch.zeros_like(before), "glora_E.X": after - before},
    ),
)
def glora(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """W + W * (A1 B1) + A2 B2; A1, A2 Kaiming-uniform and B1 = B2 = 0 at the start. On W alone, not the bias.
    arXiv 2306.07967"""
    a1, b1, a2, b2 = (
        Dense(site.tuned(name, *start))
        for i in "12"
        for name, start in ((f"a{i}", ((site.n, rank), kaiming_uniform)), (f"b{i}", ((rank, site.m), 0.0)))
    )
    return w + Hadamard(w, a1 @ b1) + a2 @ b2
