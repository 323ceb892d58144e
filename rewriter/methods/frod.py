"""FRoD: the weight in its singular bases, tuned on the diagonal and at sparse places beside it."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rewriter.algebra import Dense, Diag, Operator, Patch
from rewriter.transforms import Density, Peft, Place, Scope, Stored, choice, same, transform

Held = Annotated[bool, Field(description="the adapter holds a basis of all inputs, as PEFT's does")]
_RIDGE = 1e-3  # PEFT's `regularization_alpha`
_SAME = 1e-3  # of vectors in float32 that others found


def _rows(basis: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of basis^-1 W (n, m), at length 1 (0 where they vanish), and their lengths; in float64."""
    try:
        rows = torch.linalg.solve(basis.double(), w.double())
    except RuntimeError:
        raise ValueError("frod_V is no basis: it has no inverse") from None
    lengths = rows.norm(dim=-1)
    seen = lengths > 1e-12
    return rows * (seen / lengths.where(seen, 1.0)).unsqueeze(-1), lengths


def _kind(module: str, _: int) -> str:
    """What PEFT calls the modules that share a basis."""
    *_, third, second, last = ("", "", *module.split("."))
    if not second or second.isdigit():
        return last
    named = f"{second}_{last}"
    return "attention_output" if named == "output_dense" and third == "attention" else named


def _write(options) -> dict[str, float]:
    if not options.held:
        raise ValueError("PEFT has one basis for the weights of a kind (held: true)")
    return {"regularization_alpha": _RIDGE}


def _places(value: Tensor, at: Place) -> Tensor:
    rows, columns = value
    if value.min() < 0 or value.max() >= at.n or bool((rows == columns).any()):
        raise ValueError(f"frod_s_indices are not off the diagonal of {at.n} x {at.n}")
    return columns * at.n + rows


def _as_pairs(value: Tensor, at: Place) -> Tensor:
    return torch.stack([value % at.n, value // at.n])


def _shared(modules: Sequence[tuple[Tensor, Place]]) -> Tensor:
    """The basis of the modules of a kind. PEFT reads it, and takes U from the one that it finds: these must agree.

    Raises:
        ValueError: they do not.
    """
    basis = modules[0][0]
    found = _joint([at.weight.mT.float().cpu() for _, at in modules]).to(basis)
    rounding = 4 * torch.finfo(modules[0][1].weight.dtype).eps  # PEFT has it in the weight's type.
    near = max(_SAME, rounding) * basis.norm()
    if any(not torch.equal(value, basis) for value, _ in modules) or (found - basis).norm() > near:
        raise ValueError("PEFT has one basis for the weights of a kind, which it finds itself, and this is another")
    return basis


def _joint(weights: Sequence[Tensor]) -> Tensor:
    """The right basis (n, n) of several weights (m, n): E with R^t E, the E that diagonalises the mean of the inverses
    of Q_i^t Q_i, Q R the decomposition of all."""
    whole = torch.cat(list(weights))
    if whole.shape[0] < whole.shape[1]:
        return torch.linalg.svd(whole)[2].mT
    q, r = torch.linalg.qr(whole)
    eye = torch.eye(len(r))
    grams = [part.mT @ part + _RIDGE * eye for part in q.split([len(one) for one in weights])]
    return r.mT @ torch.linalg.eigh(sum(map(torch.linalg.inv, grams)) / len(grams))[1]


def _sizes(modules: Sequence[tuple[Tensor, Place]]) -> Tensor:
    return torch.tensor([modules[0][1].n] * 2)


@transform(
    "reconstruction",
    peft=Peft(
        "FROD",
        {
            "t": same("frod_lambda_l"),
            "d": same("frod_lambda_s_values"),
            "basis": Stored("frod_V", same("").ours, None, ending=_kind, joined=_shared),
            "rows": Stored("frod_V", lambda value, at: _rows(value, at.weight)[0].to(value), None, ending=_kind),
            "indices": Stored("frod_s_indices", _places, _as_pairs, ending=_kind),
            "": Stored("frod_s_size", same("").ours, None, ending=_kind, joined=_sizes),
        },
        {"density": "sparse_rate"},
        read=lambda *_: {"held": True},
        finds="the basis of the weights of a kind",
        write=_write,
        ignored=frozenset(
            {"projection_prng_key", "regularization_alpha", "progressbar", "runtime_offload_base_weight"}
        ),
    ),
)
def frod(w: Operator, site: Scope, *, density: Density = 0.02, held: Held = False) -> Operator:
    """U (Diag(t) + Sparse(D)) Vt, D at `density` k^2 random places off the diagonal, k = min(n, m); t = S, D = 0.
    doi 10.1609/aaai.v40i31.39813

    The bases are the weight's singular ones. With `held`, as PEFT has it, U is any basis of the k = n inputs that the
    adapter holds (at the start the singular one), Vt the rows of U^-1 W at length 1 and t their lengths.
    """
    k = site.n if held else min(site.n, site.m)
    if held:
        site.check_first()
        left = lambda *_: torch.linalg.svd(w.dense().detach().float(), full_matrices=True)[0]  # noqa: E731
        u = site.frozen("basis", (k, k), left, apart=True)
        parts = lambda: _rows(u.detach(), w.dense().detach())  # noqa: E731
        vt, s = site.frozen("rows", (k, site.m), lambda *_: parts()[0].float(), apart=True), lambda *_: parts()[1]
    else:
        u, s, vt = site.svd()
    count = min(max(1, int(k * k * density)), k * (k - 1))
    off = lambda shape, g: (i := choice(k * (k - 1))(shape, g)) + i // k + 1  # noqa: E731
    middle = Diag(site.tuned("t", k, s))
    middle = Patch(middle, site.chosen("indices", count, off, below=k * k, distinct=True), site.tuned("d", count, 0.0))
    return Dense(u) @ middle @ Dense(vt)
