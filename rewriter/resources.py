"""Where names in a spec lead: package resources, local paths, hub ids."""

import importlib.util
import os
from pathlib import Path

from .errors import SpecError, UnreachableError

PACKAGE = "package://"


def resolve(name: str, path: tuple[str | int, ...]) -> str:
    """A path on disk for `package://<package>/<resource>` and for local paths; any other name unchanged (a hub id).

    The package is located, not imported: no code of it runs.

    Args:
        name: as written in the spec.
        path: place in the spec, for the error.

    Raises:
        UnreachableError: the package is not installed.
        SpecError: the resource does not exist, or it lies outside the package.
    """
    if "\0" in name:
        raise SpecError(f"{name!r} holds a NUL, which no path does", path)
    if not name.startswith(PACKAGE):
        try:
            return str(Path(name).expanduser().absolute()) if is_local(name) else name
        except RuntimeError:
            raise SpecError(f"{name!r} starts with a home folder that there is not", path) from None
    package, _, inner = name.removeprefix(PACKAGE).partition("/")
    try:
        found = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        found = None
    roots = list(found.submodule_search_locations or []) if found else []
    if not roots:
        raise UnreachableError(f"package {package!r} is not installed: pip install {package.replace('_', '-')}", path)
    root = Path(roots[0]).resolve()
    target = (root / inner).resolve()
    if not target.is_relative_to(root):
        raise SpecError(f"{name!r} leads out of the package", path)
    if not target.exists():
        raise SpecError(f"package {package!r} has no {inner!r}", path)
    return str(target)


def is_local(name: str) -> bool:
    """Whether a name is a path: it exists, or is written like one."""
    return name.startswith((".", "/", "~")) or ("\0" not in name and os.path.exists(name))


def existing(name: str, path: tuple[str | int, ...]) -> str:
    """`resolve`, for a name that must be on disk.

    Raises:
        SpecError: nothing is there.
    """
    target = resolve(name, path)
    if not os.path.exists(target):
        raise SpecError(f"no such file: {name}", path)
    return target
