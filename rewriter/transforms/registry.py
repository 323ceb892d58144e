"""The registry: transforms by name, of this package, of anyone's, and from files that a command line names."""

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, create_model, field_validator
from torch import Tensor

from ..algebra import Operator
from ..errors import SpecError, SubspanError, reason
from .leaf import Leaf
from .peft import Peft
from .schedule import Schedule
from .scope import KINDS, Scope

GROUP = "subspan.transforms"
METHODS = "rewriter.methods"
CLASSES = ("reconstruction", "extension", "combination")
_LARGEST = 1e18
Chain = Sequence[tuple["Transform", BaseModel]]


class _Options(BaseModel):
    """Options of any transform."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        if isinstance(value, float) and abs(value) > _LARGEST:
            raise ValueError(f"{value:g} is no number to compute with; {_LARGEST:g} at most")
        return value


@dataclass(frozen=True)
class Origin:
    """Where a transform comes from: an installed distribution with its version, or a file with its hash."""

    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"

    @property
    def is_file(self) -> bool:
        """Whether it is a file that a command line named."""
        return self.version.startswith("sha256:")


@dataclass(frozen=True)
class Transform:
    """A registered transform.

    Attributes:
        kind: its class of the source's: reconstruction, extension or combination.
        function: from an operator, a scope and options to an operator.
        options: the model that checks its options in a spec.
        on: the kinds of site it stands on, of `KINDS`.
        origin: None for what is defined in a session of one's own.
        peft: how PEFT's folders have it; None where they don't.
    """

    name: str
    kind: str
    function: Callable[..., Operator]
    options: type[BaseModel]
    on: tuple[str, ...]
    doc: str
    origin: Origin | None
    peft: Peft | None = field(default=None, compare=False, repr=False)

    def __call__(self, w: Operator, site: Scope, options: BaseModel) -> Operator:
        return self.function(w, site, **{name: getattr(options, name) for name in type(options).model_fields})


class Registry(Mapping[str, Transform]):
    """Transforms by name. All that is installed is loaded when it is read for the first time.

    Attributes:
        broken: distribution -> why its transforms could not be loaded.
        ambiguous: name of a transform -> the two distributions that both have one of that name.
    """

    def __init__(self) -> None:
        self._found: dict[str, Transform] = {}
        self._loaded = False
        self._origin: Origin | None = None
        self.broken: dict[str, str] = {}
        self.ambiguous: dict[str, tuple[Origin, Origin]] = {}

    def __getitem__(self, name: str) -> Transform:
        self._load()
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._found)

    def __len__(self) -> int:
        self._load()
        return len(self._found)

    def add(self, one: Transform) -> None:
        """Register a transform; one may replace itself (a notebook's cell that runs again).

        Raises:
            SubspanError: another one has the name.
        """
        self._load()
        there = self._found.get(one.name)
        if there and (there.function.__module__, there.origin) != (one.function.__module__, one.origin):
            if there.origin and one.origin and "subspan" not in (there.origin.package, one.origin.package):
                self.ambiguous[one.name] = (there.origin, one.origin)
                return
            raise SubspanError(f"there is a transform {one.name!r} already, of {there.origin or 'this session'}")
        self._found[one.name] = one

    @property
    def origin(self) -> Origin | None:
        """What is being loaded."""
        return self._origin

    @contextlib.contextmanager
    def loading(self, origin: Origin) -> Iterator[None]:
        """Transforms that are registered inside come from there."""
        before, self._origin = self._origin, origin
        try:
            yield
        finally:
            self._origin = before

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        with self.loading(Origin("subspan", _version("subspan"))):
            methods = importlib.import_module(METHODS)
            for file in pkgutil.iter_modules(methods.__path__):
                importlib.import_module(f"{METHODS}.{file.name}")
        for entry in entry_points(group=GROUP):
            package = entry.dist.name if entry.dist else entry.value
            try:
                with self.loading(Origin(package, entry.dist.version if entry.dist else "unknown")):
                    entry.load()
            except (Exception, SystemExit) as error:
                self.broken[package] = reason(error)

    def load_file(self, file: str | Path) -> None:
        """Run a Python file that registers transforms; a user names it on the command line, a spec never can.

        Raises:
            SubspanError: there is none, it fails, or it registers nothing new.
        """
        file, before = Path(file), len(self)
        try:
            code = file.read_bytes()
            name = f"subspan_transforms_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
            if name in sys.modules:
                return
            spec = importlib.util.spec_from_file_location(name, file)
            module = importlib.util.module_from_spec(spec) if spec else None
            if module is None:
                raise SubspanError("not a Python file (.py)")
            sys.modules[name] = module
            try:
                with self.loading(Origin(file.name, f"sha256:{hashlib.sha256(code).hexdigest()[:16]}")):
                    spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
        except (Exception, SystemExit) as error:
            text = getattr(error, "strerror", None) or reason(error)
            raise SubspanError(f"--transforms {file}: {text}") from error
        if len(self) == before:
            raise SubspanError(f"--transforms {file}: it registers no transform; decorate one with @transform(...)")


TRANSFORMS = Registry()


def entire() -> Transform:
    """The transform that stands for a parameter itself: each entry is tuned."""
    return next(one for one in TRANSFORMS.values() if one.peft and one.peft.whole)


def _version(package: str) -> str:
    try:
        return version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def transform(
    kind: str, *, on: tuple[str, ...] = ("matrix",), peft: Peft | None = None
) -> Callable[[Callable[..., Operator]], Callable]:
    """Register a function under its name; its keyword arguments become its validated options in a spec.

    The function is called as `function(w, site, **options)` and returns an operator: `w` is the operator to transform,
    `site` a `Scope` through which it declares its tensors. Its docstring is the documentation.

    Args:
        kind: its class: reconstruction (W's own subspaces are changed), extension (a term is added), or combination.
        on: what it transforms, of `KINDS`: parameters that are a matrix (any parameter of two or more dimensions) or a
            vector, or a matrix of cross_attention; a layer's attention or feed_forward sublayer; the keys and values of
            attention; token embeddings.
        peft: how PEFT's adapter folders have it, if they do.

    Raises:
        TypeError: the class or a kind of site is none of those.
    """
    if kind not in CLASSES or not set(on) <= set(KINDS):
        raise TypeError(f"@transform(kind, on=...): kind is one of {CLASSES}, on are some of {KINDS}")

    def register(function: Callable[..., Operator]) -> Callable[..., Operator]:
        untyped = [
            name
            for name, p in inspect.signature(function).parameters.items()
            if p.kind is p.KEYWORD_ONLY and p.annotation is p.empty
        ]
        if untyped:
            raise TypeError(f"{function.__name__}: the option {untyped[0]!r} needs a type, e.g. {untyped[0]}: Rank")
        fields = {
            name: (p.annotation, ... if p.default is p.empty else p.default)
            for name, p in inspect.signature(function, eval_str=True).parameters.items()
            if p.kind is p.KEYWORD_ONLY
        }
        doc = inspect.cleandoc(function.__doc__ or "")
        options: Any = create_model(f"{function.__name__}_options", __base__=_Options, __doc__=doc, **fields)
        own = Origin("subspan", _version("subspan")) if function.__module__.startswith(f"{METHODS}.") else None
        origin = TRANSFORMS.origin or own
        TRANSFORMS.add(Transform(function.__name__, kind, function, options, tuple(on), doc, origin, peft))
        return function

    return register


def named(chain: Chain, site: str) -> Iterator[tuple[str, Transform, BaseModel]]:
    """The transforms of a chain with their names at a site: `<site>.<transform>`, a second use `<transform>_2`, ..."""
    seen: set[str] = set()
    for i, (one, options) in enumerate(chain):
        uses = sum(other.name == one.name for other, _ in chain[: i + 1])
        name = f"{site}.{one.name}" + (f"_{uses}" if uses > 1 else "")
        if name in seen:
            raise SpecError(f"two transforms of the chain are called {name.rpartition('.')[2]}")
        seen.add(name)
        yield name, one, options


def compose(
    chain: Chain,
    w: Operator,
    shape: tuple[int, ...],
    lookup: Callable[[Leaf], Tensor],
    name: str,
    kind: str = "matrix",
    given: Mapping[str, Mapping[str, int]] | None = None,
    training: bool = False,
    penalties: list[tuple[str, Tensor]] | None = None,
    schedules: list[tuple[str, Schedule]] | None = None,
) -> Operator:
    """phi(W) of a chain, first to last (f, then g), with the leaves that `lookup` gives.

    Args:
        name: of the site; leaves are called `<name>.<transform>.<leaf>`.
        kind: of the site.
        given: `<name>.<transform>` -> sizes that a schedule has settled.
        training: for the train graph.
        penalties, schedules: filled with those of the chain.

    Raises:
        SpecError: a transform can't stand where it stands.
    """
    penalties, schedules = ([] if one is None else one for one in (penalties, schedules))
    for i, (own, one, options) in enumerate(named(chain, name)):
        sizes = (given or {}).get(own, {})
        w = one(w, Scope(kind, shape, lookup, own, i == 0, sizes, training, penalties, schedules), options)
        if not isinstance(w, Operator):
            raise SpecError(f"{one.name} returns {type(w).__name__}, not an operator")
    return w
