"""Singular values and vectors of the frozen weight, tuned or replaced."""

from rewriter.algebra import Dense, Diag, Operator
from rewriter.methods.lora import INERT
from rewriter.transforms import RANKS, Peft, Rank, Scope, transform, transposed


@transform("reconstruction")
def sam_parser(w: Operator, site: Scope) -> Operator:
    """U Diag(t) Vt, t = S at the start: the singular values are tuned. (7)"""
    u, s, vt = site.svd()
    return Dense(u) @ Diag(site.tuned("t", min(site.n, site.m), s)) @ Dense(vt)


@transform("combination")
def svdiff(w: Operator, site: Scope) -> Operator:
    """U Diag(relu(S + d)) Vt, d = 0 at the start: the singular values are shifted and stay non-negative. (39)(40)"""
    u, s, vt = site.svd()
    return Dense(u) @ Diag((s + site.tuned("d", min(site.n, site.m), 0.0)).relu()) @ Dense(vt)


@transform("combination")
def spectral(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """(Ur + A) Sr (Vr + B)t + the rest of W: the top singular vectors are tuned; A = B = 0 at the start. (37)(38)"""
    u, s, vt = site.svd()
    u, s, vt = u[..., :rank], Diag(s[..., :rank]), vt[..., :rank, :]
    a = site.tuned("a", (site.n, rank), 0.0)
    b = site.tuned("b", (rank, site.m), 0.0)
    return w + Dense(u + a) @ s @ Dense(vt + b) - Dense(u) @ s @ Dense(vt)


def _unscaled(config, _) -> dict:
    if config.get("lora_alpha") != config["r"]:
        raise ValueError(f"lora_alpha: {config.get('lora_alpha')} is another than r, {config['r']}")
    return {}


@transform(
    "extension",
    peft=Peft(
        "LORA",
        {"a": transposed("lora_A.weight"), "b": transposed("lora_B.weight")},
        {"rank": "r"},
        fits=lambda config, tensors: config.get("init_lora_weights") == "pissa",
        read=_unscaled,
        write=lambda options: {"init_lora_weights": "pissa", "lora_alpha": options.rank},
        fixed={"use_dora": (False,), "use_rslora": (False,)},
        ignored=INERT | {"init_lora_weights", "lora_alpha"},
        biases="lora_only",
        patterns=RANKS,
    ),
)
def pissa(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """W - A0 B0 + A B; A = A0 = Ur Sr^(1/2), B = B0 = Sr^(1/2) Vr^t, the largest singular values. arXiv 2404.02948"""
    return _replaced(w, site, slice(0, rank))


@transform("extension")
def milora(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """As `pissa`, of the smallest singular values. arXiv 2406.09044"""
    k = min(site.n, site.m)
    return _replaced(w, site, slice(k - rank, k))


def _replaced(w: Operator, site: Scope, part: slice) -> Operator:
    u, s, vt = site.svd()
    root, rank = s[..., part].sqrt(), part.stop - part.start
    a0, b0 = u[..., part] * root.unsqueeze(-2), root.unsqueeze(-1) * vt[..., part, :]
    a, b = site.tuned("a", (site.n, rank), a0), site.tuned("b", (rank, site.m), b0)
    return w - Dense(a0) @ Dense(b0) + Dense(a) @ Dense(b)
