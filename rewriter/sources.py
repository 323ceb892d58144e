"""Files of data, read by the builders of `datasets` as they are named: no globs, no network, no cache that stays."""

import contextlib
import dataclasses
import gzip
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import datasets
from datasets.data_files import DataFilesDict, DataFilesList

from .errors import SpecError, SubspanError, UnreachableError, reason
from .resources import existing
from .spec import Data

# format -> class, as `datasets` has them
BUILDERS = {
    "csv": "Csv",
    "json": "Json",
    "parquet": "Parquet",
    "arrow": "Arrow",
    "text": "Text",
    "imagefolder": "ImageFolder",
}
_FILES = ("data", "files")
_ODD = set("[]*?:#!{}")


def read(data: Data) -> dict[str, datasets.Dataset]:
    """The parts of a data section, by name.

    Files are read alone: what is prepared from them lies in a temporary folder for as long as the process lives.

    Raises:
        SpecError: they can't be read, or an option is none of the format's reader.
        UnreachableError: the data set of a hub can't be reached.
    """
    with _explained(data), bars():
        if data.files is None:
            found = datasets.load_dataset(data.name, data.config)
            return {name: part for name, part in found.items() if name in ("train", "validation")} or dict(found)
        given = data.files if isinstance(data.files, dict) else {"train": data.files}
        files = {
            name: [existing(file, _FILES) for file in ([some] if isinstance(some, str) else some)]
            for name, some in given.items()
        }
        _check_options(data)
        return {name: _part(data, some) for name, some in files.items()}


def _builder(format: str) -> type[datasets.DatasetBuilder]:
    return getattr(importlib.import_module(f"datasets.packaged_modules.{format}.{format}"), BUILDERS[format])


def _check_options(data: Data) -> None:
    """Refuse what is no option of the format itself: where to cache, how to fetch, with which token."""
    own = {field.name for field in dataclasses.fields(_builder(data.format).BUILDER_CONFIG_CLASS)}
    own -= {field.name for field in dataclasses.fields(datasets.BuilderConfig)} | {"features"}
    for option in data.options:
        if option not in own:
            known = ", ".join(sorted(own))
            raise SpecError(f"{data.format} has no option {option!r}, only {known}", ("data", "options", option), True)


def _part(data: Data, files: Sequence[str]) -> datasets.Dataset:
    folder = _folder()
    if data.format == "imagefolder":
        for file in files:
            if not os.path.isdir(file):
                raise SpecError(f"{file} is no folder of images", _FILES)
        files = [name for file in files for name in _inside(file)]
    for file in files:
        _check_file(file, data)
    plain = [_plain(file, folder, i) for i, file in enumerate(files)]
    stamps = [(str(os.stat(file).st_mtime_ns), str(os.stat(file).st_size)) for file in files]
    found = DataFilesDict({"train": DataFilesList(plain, stamps)})
    builder = _builder(data.format)(cache_dir=str(folder), data_files=found, **data.options)
    builder.download_and_prepare()
    return builder.as_dataset(split="train")


@cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="subspan-data-")


def _folder() -> Path:
    return Path(tempfile.mkdtemp(dir=_root().name))


def _inside(folder: str) -> list[str]:
    """The files in a folder; what a link in it leads to elsewhere is none of them."""
    root = Path(folder).resolve()
    files = (file for file in sorted(Path(folder).rglob("*")) if file.is_file() and not file.name.startswith("."))
    return [str(file) for file in files if file.resolve().is_relative_to(root)]


def _plain(file: str, folder: Path, number: int) -> str:
    """The file, by a name that no library takes for a pattern or a chain of protocols."""
    if not _ODD & set(file):
        return file
    # Folders' names are labels of images.
    link = folder / str(number) / (Path(file).parent.name if not _ODD & set(Path(file).parent.name) else "folder")
    link.mkdir(parents=True)
    name = "".join("_" if c in _ODD else c for c in Path(file).name)
    (link / name).symlink_to(os.path.abspath(file))
    return str(link / name)


def _check_file(file: str, data: Data) -> None:
    """What the readers answer with less than a sentence, or not at all."""
    if not os.path.isfile(file):
        what = "a folder" if os.path.isdir(file) else "no regular file"
        raise SpecError(f"{file} is {what}, not a {data.format} file", _FILES)
    if os.path.getsize(file) == 0:
        raise SpecError(f"{file} is empty", _FILES)
    if data.format == "json":
        with open(file, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with (gzip.open if zipped else open)(file, "rb") as text:
            start = text.read(4096).replace(b"\x00", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n")[:1]
        packed = Path(file).suffix in (".zip", ".bz2", ".xz", ".zst", ".lz4", ".7z")
        if start not in (b"{", b"[") and not packed:
            raise SpecError(f"{file}: rows of JSON start with {{, or a list of them with [", _FILES)


@contextlib.contextmanager
def bars() -> Iterator[None]:
    """Progress bars on a terminal alone."""
    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@contextlib.contextmanager
def _explained(data: Data) -> Iterator[None]:
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # What it says of a file is in the error.
    try:
        yield
    except (SubspanError, KeyboardInterrupt):
        raise
    except Exception as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, FileNotFoundError):
            raise cause from None
        path = ("data", "name") if data.files is None else _FILES
        kind = UnreachableError if isinstance(error, ConnectionError) else SpecError
        raise kind(f"can't read the data: {reason(cause)}", path) from error
    finally:
        datasets.logging.set_verbosity(level)
