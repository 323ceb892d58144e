"""Files of data, read by the builders of `datasets` as they are named: no globs, no network, no cache that stays."""

import contextlib
import dataclasses
import gzip
import importlib
import os
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pandas
from datasets.data_files import DataFilesDict, DataFilesList

from .errors import SpecError, SubspanError, UnreachableError, reason
from .resources import existing
from .spec import Data
from .spec.data import Source

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
_MISSING = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"]  # in columns of numbers
_ODD = set("[]*?:#!{}")


def read(data: Data, texts: Collection[str] = ()) -> dict[str, datasets.Dataset]:
    """The parts of a data section, by name.

    Files are read alone: what is prepared from them lies in a temporary folder for as long as the process lives.

    Args:
        texts: columns of csv files that are read as they are written: 01 is no number, NA is no missing value.

    Raises:
        SpecError: they can't be read, an option is none of the format's reader, or a csv file has two columns of a
            name that is read.
        UnreachableError: the data set of a hub can't be reached.
    """
    with _explained(data), bars():
        if data.files is None:
            if os.path.exists(data.name):  # What its README says to fetch would be fetched.
                raise SpecError(f"{data.name} is on this disk: name its files in data.files", ("data", "name"))
            found = datasets.load_dataset(data.name, data.config)
            return {name: part for name, part in found.items() if name in ("train", "validation")} or dict(found)
        files = {name: [existing(file, _FILES) for file in some] for name, some in _named(data).items()}
        _check_options(data)
        return {name: _part(data, some, texts) for name, some in files.items()}


def absent(data: Data) -> str | None:
    """What to say of the first file of a data section that is not on this disk; None where all are, or a hub has it."""
    for file in (file for one in data.sources for some in _named(one).values() for file in some):
        try:
            existing(file, _FILES)
        except SpecError as error:
            return error.message
    return None


def _named(data: Source) -> dict[str, list[str]]:
    """Part -> its files, as they are written; empty for a hub's data set."""
    given = data.files if isinstance(data.files, dict) else {"train": data.files}
    return {name: [some] if isinstance(some, str) else some for name, some in given.items() if some is not None}


def _builder(format: str) -> type[datasets.DatasetBuilder]:
    return getattr(importlib.import_module(f"datasets.packaged_modules.{format}.{format}"), BUILDERS[format])


def _check_options(data: Data) -> None:
    """Refuse what is no option of the format itself: where to cache, how to fetch, with which token."""
    own = {field.name for field in dataclasses.fields(_builder(data.format).BUILDER_CONFIG_CLASS)}
    own -= {field.name for field in dataclasses.fields(datasets.BuilderConfig)} | {"features", "converters"}
    for option in data.options:
        if option not in own:
            known = ", ".join(sorted(own))
            raise SpecError(f"{data.format} has no option {option!r}, only {known}", ("data", "options", option), True)


def _part(data: Data, files: Sequence[str], texts: Collection[str]) -> datasets.Dataset:
    folder = _folder()
    if data.format == "imagefolder":
        for file in files:
            if not os.path.isdir(file):
                raise SpecError(f"{file} is no folder of images", _FILES)
        files = [name for file in files for name in _inside(file)]
    options = {**_as_written(data, texts), **data.options}
    for file in files:
        _check_file(file, data)
        if data.format == "csv":
            _check_fields(file, options)
    plain = [_plain(file, folder, i) for i, file in enumerate(files)]
    stamps = [(str(os.stat(file).st_mtime_ns), str(os.stat(file).st_size)) for file in files]
    found = DataFilesDict({"train": DataFilesList(plain, stamps)})
    builder = _builder(data.format)(cache_dir=str(folder), data_files=found, **options)
    builder.download_and_prepare()
    part = builder.as_dataset(split="train")
    _check_twice(data, part.column_names)
    return part


def _as_written(data: Data, texts: Collection[str]) -> dict[str, Any]:
    """Options of the csv reader with which cells of texts stay what they are, but for empty ones, which are missing."""
    if data.format != "csv":
        return {}
    given = {"converters": dict.fromkeys(texts, str)}
    if {"keep_default_na", "na_values"} & data.options.keys():
        return given
    others = {column: _MISSING for column in (*data.reads, *data.where) if column not in texts}
    return given | {"keep_default_na": False, "na_values": {**others, **{column: [""] for column in texts}}}


def _check_fields(file: str, options: Mapping[str, Any]) -> None:
    """Refuse rows with more fields than the header names: pandas takes the first for a number of the row.

    Raises:
        SpecError: at `data.files`.
    """
    given = _builder("csv").BUILDER_CONFIG_CLASS(name="fields", **options).pd_read_csv_kwargs
    start = pandas.read_csv(file, **(given | {"nrows": 100, "chunksize": None, "iterator": False}))
    if not isinstance(start.index, pandas.RangeIndex) and given.get("index_col") is None:
        raise SpecError(f"{file}: rows have more fields than the header has names; quote what holds commas", _FILES)


def _check_twice(data: Data, names: Sequence[str]) -> None:
    """Refuse a csv file with two columns of a name that is read: pandas calls the second one `name.1`."""
    for column, place in data.reads.items():
        if data.format == "csv" and f"{column}.1" in names:
            said = f"two columns are called {column!r}, or one {column + '.1'!r}: which one is meant? Rename one"
            raise SpecError(said, ("data", *place))


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
        if "corresponds to no data" in str(cause):
            raise SpecError("the data has no rows", path) from None
        kind = UnreachableError if isinstance(error, ConnectionError) else SpecError
        raise kind(f"can't read the data: {reason(cause)}", path) from error
    finally:
        datasets.logging.set_verbosity(level)
