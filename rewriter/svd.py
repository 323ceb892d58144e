"""Singular value decompositions of frozen weights, once per weight."""

import contextlib
import hashlib
import warnings

import torch

from .errors import SubspanError
from .files import aside, cache_folder, load_tensors, save_tensors
from .transforms import decompose


def cached_svd(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """`decompose`, once per weight: the factors are kept in `$SUBSPAN_CACHE`, by default `~/.cache/subspan`.

    A cache that can't be read or written is passed over; one that holds no decomposition of this weight is named in a
    warning and made anew.
    """
    data = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype}{tuple(data.shape)}".encode())
    digest.update(data.view(torch.uint8).numpy())
    file = cache_folder("svd") / f"{digest.hexdigest()}.safetensors"
    try:
        factors = load_tensors(file)
        if wrong := _wrong(data, factors):
            warnings.warn(f"{file}: {wrong}; it is computed anew", stacklevel=2)
        else:
            return {name: factor.to(weight.device) for name, factor in factors.items()}
    except (OSError, SubspanError):
        pass
    factors = decompose(weight)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with aside(file) as (place,):
            save_tensors(factors, place)
    return factors


def _wrong(weight: torch.Tensor, factors: dict[str, torch.Tensor]) -> str | None:
    """Why factors are no decomposition of a weight; products with a few vectors tell, for a fraction of its cost.

    Tolerances: what float32 leaves of exact products of sizes up to some thousands.
    """
    if factors.keys() != {"u", "s", "vt"}:
        return "not the factors u, s and vt"
    u, s, vt = (factors[name] for name in ("u", "s", "vt"))
    *batch, n, m = weight.shape
    shapes = (*batch, n, min(n, m)), (*batch, min(n, m)), (*batch, min(n, m), m)
    same = tuple(tuple(one.shape) for one in (u, s, vt)) == shapes
    if not same or not all(one.is_floating_point() for one in (u, s, vt)):
        return "factors of another shape or type"
    if not all(bool(torch.isfinite(one).all()) for one in (u, s, vt)) or bool((s < 0).any()):
        return "factors that are not finite, or negative singular values"
    u, s, vt, w = (one.double() for one in (u, s, vt, weight))
    size = w.flatten(-2).norm(dim=-1).clamp_min(1e-30).unsqueeze(-1).unsqueeze(-1)
    probe = torch.randn(m, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if bool(((u * s.unsqueeze(-2)) @ (vt @ probe) - w @ probe).abs().gt(1e-3 * size).any()):
        return "factors of another weight"
    probe = probe[: min(n, m)]
    for one in (u, vt.mT):
        if bool((one.mT @ (one @ probe) - probe).abs().gt(1e-3).any()):
            return "factors that are not orthogonal"
    if bool((s.diff(dim=-1) > 1e-6 * s[..., :1]).any()):
        return "singular values out of order"
    peak = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    return "factors of other signs" if bool((peak < 0).any()) else None
