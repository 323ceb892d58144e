"""DeLoRA: a low-rank term of bounded length."""

import torch

from rewriter.algebra import Dense, Diag, Operator
from rewriter.transforms import Peft, Positive, Rank, Scope, kaiming_uniform, reshaped, transform, transposed


@transform(
    "extension",
    peft=Peft(
        "DELORA",
        {
            "a": transposed("delora_A"),
            "b": transposed("delora_B"),
            "c": reshaped("delora_lambda", lambda at: (1, 1), lambda at: (1,)),
        },
        {"rank": "r", "bound": "delora_lambda"},
        ignored=frozenset({"lambda_pattern"}),
        further=("delora_w_norm",),
        patterns={"r": "rank_pattern"},
    ),
)
def delora(w: Operator, site: Scope, *, rank: Rank, bound: Positive = 1.0) -> Operator:
    """W + c / r Diag(row_norm(W)) A Diag(1 / (norm(a_i) norm(b_i))) B; A Kaiming-uniform, B = 0, c = `bound`.
    arXiv 2503.18225"""
    a = site.tuned("a", (site.n, rank), kaiming_uniform)
    b = site.tuned("b", (rank, site.m), 0.0)
    lengths = torch.linalg.vector_norm(a, dim=-2).clamp_min(1e-4) * torch.linalg.vector_norm(b, dim=-1).clamp_min(1e-4)
    rows = torch.linalg.vector_norm(w.dense(), dim=-1).detach()
    return w + site.tuned("c", (1, 1), bound) * (Diag(rows) @ Dense(a) @ Diag(1 / (rank * lengths)) @ Dense(b))
