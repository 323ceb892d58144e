"""Where a spec's model lies; a GGUF file is converted to a folder of safetensors first, once, by transformers."""

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from .base import GGUF, NAME, identity, quiet
from .errors import SpecError, SubspanError, UnreachableError, reason
from .files import aside, cache_folder, digest, recover
from .resources import is_local, resolve
from .spec import Model

_PLACE = ("model", "gguf")
_MAGIC = b"GGUF"


def files_of(model: Model) -> dict[str, str]:
    """What the files of a spec's model are known by, as `base.identity`; raises as `location_of`."""
    return identity(location_of(model), model.revision or "main")


def location_of(model: Model) -> str:
    """The folder of a spec's model, or its hub id; of a GGUF file the folder that it is converted to, in the cache.

    The weights are dequantised to `model.dtype`, by default float32; the rest is the file's own.

    Raises:
        UnreachableError: the package of the model, or the one that reads GGUF, is not installed; the hub can't be
            reached.
        SpecError: there is no such folder or file, it is no GGUF file, or transformers can't convert it.
    """
    location = resolve(model.name, NAME)
    if model.gguf is None:
        return location
    file = _file_of(model, location)
    with file.open("rb") as raw:
        if raw.read(len(_MAGIC)) != _MAGIC:
            raise SpecError(f"{model.gguf} is no GGUF file: it does not start with {_MAGIC.decode()}", _PLACE)
    if importlib.util.find_spec("gguf") is None:
        raise UnreachableError("reading GGUF needs a package: pip install 'subspan[llm]'", _PLACE)
    found = os.stat(file)
    content, dtype = _digest(file, found.st_size, found.st_mtime_ns), model.dtype or "float32"
    made_by = "-".join(f"{one}{version(one)}" for one in ("transformers", "gguf"))
    target = cache_folder("gguf") / f"{content}-{dtype}-{made_by}"
    if not target.is_dir():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(target.parent / ".lock"):
                if not target.is_dir():
                    recover(target.parent)
                    with aside(target) as (place,):
                        _convert(file, getattr(torch, dtype), place)
        except OSError as error:
            said = f"can't write what {model.gguf} is converted to, {target}: {reason(error)}"
            raise SubspanError(f"{said}; SUBSPAN_CACHE names another folder") from None
    return str(target)


@lru_cache
def _digest(file: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, once for as long as it stays as it is."""
    return digest(file)


def _file_of(model: Model, location: str) -> Path:
    """The GGUF file that a spec's model names, on disk."""
    if not is_local(location):
        try:
            return Path(hf_hub_download(location, model.gguf, revision=model.revision or "main"))
        except EntryNotFoundError as error:
            kind = UnreachableError if isinstance(error, ConnectionError | FileNotFoundError) else SpecError
            raise kind(f"{model.name} has no {model.gguf} here: {reason(error)}", _PLACE) from None
        except Exception as error:  # Of the hub's client: no connection, no such repository, no access.
            raise UnreachableError(f"can't reach {model.gguf} of {model.name}: {reason(error)}", _PLACE) from None
    if model.revision is not None:
        raise SpecError("a folder has no revisions: they are of hub models", ("model", "revision"), at_key=True)
    if not os.path.isdir(location):
        raise SpecError(f"no such folder: {model.name}", NAME)
    file = Path(location) / model.gguf
    if not file.is_file():
        there = sorted(str(one.relative_to(location)) for one in Path(location).rglob(f"*{GGUF}"))
        has = f"it has {', '.join(there)}" if there else f"it has no {GGUF} file"
        raise SpecError(f"no file {model.gguf} in {model.name}; {has}", _PLACE)
    return file


def _convert(file: Path, dtype: torch.dtype, folder: Path) -> None:
    """Write a GGUF file as `from_pretrained` reads a folder: safetensors, config and tokenizer.

    Raises:
        SpecError: transformers can't read it, or does not find all of the model's weights in it.
        OSError: no space, no permission.
    """
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    shown = sys.stderr.isatty()
    with quiet(shown), contextlib.nullcontext() if shown else contextlib.redirect_stderr(io.StringIO()):
        try:
            model = _loaded(file, dtype, transformers.AutoConfig.from_pretrained(**source), source)
            tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        except SubspanError:
            raise
        except Exception as error:  # Whatever a file that is broken makes its readers raise.
            raise SpecError(f"transformers can't convert {file.name}: {reason(error)}", _PLACE) from error
        # What it was quantised by, of which nothing is left.
        model.hf_quantizer = None
        for config in {id(one): one for one in (model.config, model.config.get_text_config())}.values():
            if hasattr(config, "quantization_config"):
                del config.quantization_config
        model.save_pretrained(folder)
        tokenizer.init_kwargs.pop("local_files_only", None)  # Whether this machine is offline.
        tokenizer.save_pretrained(folder)


def _loaded(file: Path, dtype: torch.dtype, config: Any, source: dict[str, str]) -> Any:
    """The model of a file, of the first class of transformers that finds all its weights there."""
    missing: list[str] = []
    for auto in _classes(config):
        model, info = auto.from_pretrained(**source, dtype=dtype, output_loading_info=True)
        odd = sorted({*info["missing_keys"], *(one[0] for one in info["mismatched_keys"])})
        if not odd:
            return model
        missing = missing or odd
    said = f"{len(missing)} weights of the model are not in {file.name}, e.g. {missing[0]}"
    raise SpecError(f"{said}: they would be random", _PLACE)


def _classes(config: Any) -> Iterator[Any]:
    """Classes of transformers for a config: with the head of a language model first, the base model alone last."""
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM):
        if type(config) in auto._model_mapping:
            yield auto
    yield transformers.AutoModel
