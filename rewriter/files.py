"""Files: they appear only when finished (written aside, then renamed); tensors are safetensors, never pickle."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .errors import SubspanError, reason

UNFINISHED = ".unfinished-"
WHOLE = "whole.json"


def write_text(path: Path, text: str) -> None:
    """Write a whole text file or nothing.

    Raises:
        OSError: no space, no permission.
    """
    with aside(path) as (place,):
        place.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(file: Path, constants: bool = False) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
        constants: whether NaN and Infinity, which Python writes beyond JSON, are read.

    Raises:
        SubspanError: there is none, or it is broken.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"), parse_constant=None if constants else _refuse)
    except FileNotFoundError:
        raise SubspanError(f"{file}: no such file") from None
    except json.JSONDecodeError as error:
        raise SubspanError(f"{file}:{error.lineno}:{error.colno}: broken JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise SubspanError(f"{file}: broken JSON ({reason(error)})") from None
    if not isinstance(data, dict):
        raise SubspanError(f"{file}: holds no JSON object")
    return data


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def cache_folder(name: str) -> Path:
    """Where what takes long to make is kept: a folder in `$SUBSPAN_CACHE`, by default in `~/.cache/subspan`."""
    return Path(os.environ.get("SUBSPAN_CACHE") or Path.home() / ".cache" / "subspan") / name


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


@contextlib.contextmanager
def aside(*targets: Path) -> Iterator[list[Path]]:
    """Places beside `targets` to write to; they are renamed, in order, when the block ends without an error.

    What stood at a target is replaced then and not before; after an error nothing of the block is left. Where the
    process dies while it renames, `recover` renames the rest.
    """
    root = targets[0].parent
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=root) as folder:
        places = [Path(folder) / "new" / target.name for target in targets]
        (Path(folder) / "new").mkdir()
        yield places
        _open_up(Path(folder))
        written = {place.name: place.exists() for place in places}
        if len(targets) > 1 or any(target.is_dir() for target in targets):
            (Path(folder) / "whole").write_text(json.dumps(written), encoding="utf-8")
            os.replace(Path(folder) / "whole", Path(folder) / WHOLE)
        _put(Path(folder), root, written)


def _put(folder: Path, root: Path, written: Mapping[str, bool]) -> None:
    """Rename what is whole to where it belongs; what was renamed before stays."""
    for name, there in written.items():
        place, target = folder / "new" / name, root / name
        # A file is replaced in one step; a folder has to make room first.
        if (place.exists() and target.is_dir()) or (target.exists() and not there):
            os.replace(target, Path(tempfile.mkdtemp(dir=folder)) / name)
        if place.exists():
            os.replace(place, target)


def recover(root: Path) -> None:
    """Remove what processes that died left unfinished in a folder; what was whole by then is put in its place."""
    for folder in root.glob(f"{UNFINISHED}*/"):
        with contextlib.suppress(OSError, ValueError):
            written = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
            _put(folder, root, written)
        shutil.rmtree(folder, ignore_errors=True)


def _open_up(folder: Path) -> None:
    """Give files the usual permissions: safetensors makes them readable to their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)


def remove(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: no space, no permission.
    """
    try:
        safetensors.torch.save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file)
    except safetensors.SafetensorError as error:
        raise OSError(f"can't write {file}: {error}") from None


def load_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        SubspanError: there is no such file, or it is truncated or not a safetensors file.
    """
    try:
        return safetensors.torch.load_file(file)
    except FileNotFoundError:
        raise SubspanError(f"{file}: no such file") from None
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise SubspanError(f"{file}: truncated, or not a safetensors file ({error})") from None


def load_into(parameters: Mapping[str, torch.Tensor], file: Path) -> None:
    """Copy the tensors of a file into parameters or buffers of the same names.

    Raises:
        SubspanError: the file can't be read, names, shapes or kinds of types differ, or a value is not finite.
    """
    found = load_tensors(file)
    if odd := sorted(found.keys() ^ parameters.keys()):
        raise SubspanError(f"{file}: made for other sites; differs in {odd[0]}")
    for name, parameter in parameters.items():
        if found[name].shape != parameter.shape:
            raise SubspanError(f"{file}: {name} is {tuple(found[name].shape)}, expected {tuple(parameter.shape)}")
        value = found[name]
        if value.is_floating_point() != parameter.is_floating_point() or value.dtype == torch.bool != parameter.dtype:
            raise SubspanError(f"{file}: {name} is stored in {value.dtype}, expected {parameter.dtype}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise SubspanError(f"{file}: {name} holds a value that is not finite")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(found[name])
