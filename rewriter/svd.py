"""Singular value decompositions of frozen weights, once per weight."""

import contextlib
import hashlib
import os
from pathlib import Path

import torch

from .errors import SubspanError
from .files import aside, load_tensors, save_tensors
from .transforms import decompose


def cached_svd(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """`decompose`, once per weight: the factors are kept in `$SUBSPAN_CACHE`, by default `~/.cache/subspan`.

    A cache that can't be read or written is passed over.
    """
    data = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype}{tuple(data.shape)}".encode())
    digest.update(data.view(torch.uint8).numpy())
    root = Path(os.environ.get("SUBSPAN_CACHE") or Path.home() / ".cache" / "subspan")
    file = root / "svd" / f"{digest.hexdigest()}.safetensors"
    try:
        return {name: factor.to(weight.device) for name, factor in load_tensors(file).items()}
    except (OSError, SubspanError):
        factors = decompose(weight)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with aside(file) as (place,):
            save_tensors(factors, place)
    return factors
