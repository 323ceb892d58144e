"""Globs over dotted names: which parameters or modules the patterns of a rule mean."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable
from functools import lru_cache

from ..errors import SpecError

MAX_ALTERNATIVES = 4096
MAX_DEPTH = 20
MAX_LENGTH = 1000


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
    return [text for text, _ in _expanded(pattern)]


def _expanded(pattern: str, at: int = 0) -> list[tuple[str, frozenset[tuple[int, str]]]]:
    """The alternatives of a pattern, each with what it took in every brace: (where that starts, its text)."""
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
                tails, heads, place = _expanded(pattern[i + 1 :], at + i + 1), [], at + start + 1
                for part in _split(pattern[start + 1 : i]):
                    heads += [(text, took | {(place, part)}) for text, took in _expanded(part, place)]
                    place += len(part) + 1
                if len(tails) * len(heads) > MAX_ALTERNATIVES:
                    raise ValueError(f"more than {MAX_ALTERNATIVES} alternatives")
                return [(pattern[:start] + h + t, a | b) for h, a in heads for t, b in tails]
    if depth:
        raise ValueError("a brace is not closed" if depth > 0 else "a brace is closed but not opened")
    return [(pattern, frozenset())]


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
    expression = re.compile(fnmatch.translate(re.sub(r"([\[?])", r"[\1]", pattern)))
    return lambda text: expression.match(text) is not None


def find(patterns: list[str], names: list[str], path: tuple[str | int, ...], what: str = "parameter") -> list[str]:
    """The parameters, or other named things, that the patterns of a rule match.

    Raises:
        SpecError: at `path`: a pattern is malformed, or it or one of its alternatives matches nothing (with the nearest
            names).
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        try:
            alternatives = _expanded(pattern)
        except ValueError as error:
            raise SpecError(f"{_short(pattern)!r}: {error}", path) from None
        hits = {text: match([text], names) for text, _ in alternatives}
        if not any(hits.values()):
            raise SpecError(
                f"{_short(pattern)!r} matches no {what}; nearest: {_nearest(alternatives[0][0], names)}", path
            )
        taken = frozenset().union(*(took for text, took in alternatives if hits[text]))
        for text, took in alternatives:
            if idle := sorted(took - taken):
                said = f"{idle[0][1]!r} in {_short(pattern)!r} matches no {what}"
                raise SpecError(f"{said}; nearest to {_short(text)}: {_nearest(text, names)}", path)
        found.update(dict.fromkeys(name for some in hits.values() for name in some))
    return [name for name in names if name in found]


def _nearest(pattern: str, names: list[str]) -> str:
    near = difflib.get_close_matches(pattern.replace("*", "0"), names, n=3, cutoff=0.3)
    return ", ".join(near or names[:3])


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
