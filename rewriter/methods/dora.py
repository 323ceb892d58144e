"""Direction and magnitude of a weight's columns, tuned apart."""

import math

from rewriter.algebra import Dense, Diag, Operator, column_norm, detach
from rewriter.methods.lora import INERT, PLAIN_START
from rewriter.transforms import RANKS, Alpha, Peft, Rank, Scope, kaiming_uniform, same, transform, transposed


def _alpha(config, _) -> dict[str, float]:
    alpha = config["lora_alpha"]
    return {"alpha": alpha * math.sqrt(config["r"]) if config.get("use_rslora") else alpha}


@transform(
    "combination",
    peft=Peft(
        "LORA",
        {
            "a": transposed("lora_A.weight"),
            "b": transposed("lora_B.weight"),
            "m": same("lora_magnitude_vector"),
        },
        {"rank": "r"},
        fits=lambda config, tensors: bool(config.get("use_dora")),
        read=_alpha,
        write=lambda options: {"use_dora": True, "lora_alpha": options.alpha or options.rank},
        fixed=PLAIN_START,
        ignored=INERT | {"lora_alpha"},
        biases="lora_only",
        patterns=RANKS,
    ),
)
def dora(w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None) -> Operator:
    """V Diag(m / column_norm(V)), V = W + s A B; m = column norms of W; the norm takes no gradient. (32)(33)"""
    a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
    b = Dense(site.tuned("b", (rank, site.m), 0.0))
    v = w + (alpha or rank) / rank * (a @ b)
    norm = column_norm(detach(v)).clamp_min(1e-12)
    return v @ Diag(site.tuned("m", site.m, norm) / norm)
