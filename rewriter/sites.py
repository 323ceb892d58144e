"""Sites: where rules land. Patterns are matched against parameter names; the graph says how each weight is used."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import fx

from .algebra import Dense, Value
from .errors import SpecError

aten = torch.ops.aten
MAX_ALTERNATIVES = 4096
MAX_DEPTH = 20
MAX_LENGTH = 1000
_TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default, aten.mT.default}
_PASSING = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.contiguous.default, aten.detach.default}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "convolution", "_convolution"}
_PRODUCTS = {"mm", "bmm", "matmul", "addmm", "baddbmm", "_grouped_mm", "grouped_mm", "grouped_mm_fallback"}


@dataclass(frozen=True)
class Layout:
    """How a stored tensor is seen as a matrix W of shape (..., n, m) with y = xW; nothing else transposes.

    Attributes:
        stored: the parameter's own shape.
        transposed: stored as (..., m, n), as `nn.Linear` does.
        flattened: the dimensions after the first are one (convolutions: n = inputs x kernel).
    """

    stored: tuple[int, ...]
    transposed: bool
    flattened: bool = False

    @property
    def vector(self) -> bool:
        """Whether the parameter is a vector (or a scalar), seen as one row: n = 1."""
        return len(self.stored) < 2

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., n, m)."""
        if self.vector:
            return 1, self.stored[0] if self.stored else 1
        if self.flattened:
            return torch.Size(self.stored[1:]).numel(), self.stored[0]
        *batch, rows, columns = self.stored
        return (*batch, columns, rows) if self.transposed else (*batch, rows, columns)

    def present(self, stored: Value) -> Dense:
        """The operator W of a stored tensor."""
        if self.vector:
            return Dense(stored.reshape(self.shape))
        return Dense(stored.flatten(1) if self.flattened else stored, self.transposed)

    def restore(self, w: Value) -> Value:
        """A matrix W of shape (..., n, m), back in the parameter's own shape."""
        if self.vector or self.flattened:
            return (w if self.vector else w.transpose(-2, -1)).reshape(self.stored)
        return w.transpose(-2, -1) if self.transposed else w


def layout_of(stored: tuple[int, ...], uses: Iterable[tuple[fx.Node, fx.Node]]) -> Layout:
    """The layout that a parameter's uses in the graph imply.

    Args:
        stored: the parameter's shape.
        uses: (get_attr node, node that reads it).
    """
    default = Layout(tuple(stored), transposed=False)
    for node, user in uses:
        flipped = False
        while user.target in _TRANSPOSES | _PASSING and user.users:
            flipped ^= user.target in _TRANSPOSES
            node, user = user, next(iter(user.users))
        name = getattr(user.target, "__name__", "").split(".")[0]
        if name == "linear" and user.args[1] is node:
            return Layout(tuple(stored), transposed=not flipped)
        if name in _CONVOLUTIONS and user.args[1] is node and len(stored) > 2:
            return Layout(tuple(stored), transposed=True, flattened=True)
        if name in _PRODUCTS:
            left = user.args[1 if name in ("addmm", "baddbmm") else 0] is node
            default = Layout(tuple(stored), transposed=flipped != left)
    return default


def factored(user: fx.Node, weight: fx.Node, layout: Layout) -> tuple[fx.Node, fx.Node | None] | None:
    """(x, bias) where an op is x @ W (+ bias) in a weight's layout; None where phi(W) has to be formed."""
    args, transposed = user.args, layout.transposed
    if len(layout.stored) != 2:
        return None
    if user.target is aten.linear.default and args[1] is weight and args[0] is not weight and transposed:
        return args[0], args[2] if len(args) > 2 else None
    if user.target is aten.addmm.default and args[2] is weight and args[1] is not weight and not transposed:
        return None if user.kwargs else (args[1], args[0])
    if user.target in (aten.mm.default, aten.matmul.default) and args[1] is weight and args[0] is not weight:
        return None if transposed else (args[0], None)
    return None


def match(patterns: list[str], names: Iterable[str]) -> list[str]:
    """The names that at least one pattern matches, in their own order.

    `*` stands for any text within one dotted part, `**` for any number of parts, `{a,b}` for alternatives.

    Raises:
        ValueError: a pattern is malformed.
    """
    alternatives = [tuple(alternative.split(".")) for pattern in patterns for alternative in expand_braces(pattern)]
    return [name for name in names if any(_matches(a, tuple(name.split("."))) for a in alternatives)]


def expand_braces(pattern: str) -> list[str]:
    """All alternatives of a pattern with (nested) braces.

    Raises:
        ValueError: a brace is not closed, or the pattern is too long, nested or manifold to be meant.
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"a pattern of more than {MAX_LENGTH} characters")
    depth, start = 0, -1
    for i, char in enumerate(pattern):
        if char == "{":
            start, depth = (i if depth == 0 else start), depth + 1
            if depth > MAX_DEPTH:
                raise ValueError(f"braces nested more than {MAX_DEPTH} deep")
        elif char == "}":
            depth -= 1
            if depth < 0:
                break
            if depth == 0:
                tails = expand_braces(pattern[i + 1 :])
                heads = [inner for part in _split(pattern[start + 1 : i]) for inner in expand_braces(part)]
                if len(tails) * len(heads) > MAX_ALTERNATIVES:
                    raise ValueError(f"more than {MAX_ALTERNATIVES} alternatives")
                return [pattern[:start] + head + tail for head in heads for tail in tails]
    if depth:
        raise ValueError("a brace is not closed" if depth > 0 else "a brace is closed but not opened")
    return [pattern]


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for char in text:
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _matches(pattern: tuple[str, ...], name: tuple[str, ...]) -> bool:
    """Dynamic programming over parts: no backtracking, so no pattern is slow."""
    reach = [True] + [False] * len(name)
    for part in pattern:
        if part == "**":
            reach = [any(reach[: i + 1]) for i in range(len(name) + 1)]
        else:
            reach = [False] + [reach[i] and _part(part)(name[i]) for i in range(len(name))]
    return reach[-1]


@lru_cache(maxsize=4096)
def _part(pattern: str) -> Callable[[str], bool]:
    """Matcher of one part; only * is special. fnmatch's own expressions do not backtrack."""
    expression = fnmatch.translate(re.sub(r"([\[?])", r"[\1]", pattern))
    return lambda text: re.match(expression, text) is not None


def find(patterns: list[str], names: list[str], path: tuple[str | int, ...], what: str = "parameter") -> list[str]:
    """The parameters, or other named things, that the patterns of a rule match.

    Raises:
        SpecError: at `path`: a pattern is malformed or matches nothing (with the nearest names).
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        try:
            hits = match([pattern], names)
            nearest = difflib.get_close_matches(expand_braces(pattern)[0].replace("*", "0"), names, n=3, cutoff=0.3)
        except ValueError as error:
            raise SpecError(f"{_short(pattern)!r}: {error}", path) from None
        if not hits:
            raise SpecError(f"{_short(pattern)!r} matches no {what}; nearest: {', '.join(nearest or names[:3])}", path)
        found.update(dict.fromkeys(hits))
    return [name for name in names if name in found]


def _short(pattern: str) -> str:
    return pattern if len(pattern) <= 200 else pattern[:200] + "..."


def uneven(patterns: list[str], hits: list[str], names: list[str]) -> list[str]:
    """What a rule left out: for every numbered group of layers, those in which it matched less than in others.

    Patterns that spell out a layer's number say on purpose which layers they mean; they are not checked.

    Returns:
        One sentence per group, none where all is even.
    """
    if any(part.isdigit() for pattern in patterns for one in expand_braces(pattern) for part in one.split(".")):
        return []
    layers: dict[str, set[str]] = {}
    matched: dict[tuple[str, str], set[str]] = {}
    for source, wanted in ((names, False), (hits, True)):
        for name in source:
            parts = name.split(".")
            for i, part in enumerate(parts):
                if part.isdigit():
                    group = ".".join(parts[:i])
                    layers.setdefault(group, set()).add(part)
                    if wanted:
                        matched.setdefault((group, ".".join(parts[i + 1 :])), set()).add(part)
                    break
    sentences = []
    for (group, suffix), found in sorted(matched.items()):
        missing = sorted(layers[group] - found, key=int)
        if missing:
            left = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
            sentences.append(f"{group}.*.{suffix} is in {len(found)} of {len(layers[group])} layers; not in {left}")
    return sentences
