"""The errors a user can mend: the command line prints each as one line and exits with status 1, or the error's own."""

from collections.abc import Sequence


def printable(text: str) -> str:
    """A text whose control characters, which a terminal would obey, are written out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class SubspanError(Exception):
    """An expected failure whose message says what to do; control characters in it are written out."""

    def __str__(self) -> str:
        return printable(super().__str__())


class SpecError(SubspanError):
    """Something in a spec is wrong.

    Args:
        message: what is wrong and what to do.
        path: keys and indices from the spec's root to the place, e.g. `("rules", 0, "target")`.
        at_key: whether the key itself is to blame, not its value.
    """

    def __init__(self, message: str, path: tuple[str | int, ...] = (), at_key: bool = False):
        super().__init__(message)
        self.message, self.path, self.at_key = message, tuple(path), at_key


class UnreachableError(SpecError):
    """Something that a spec names can't be reached from here, so nothing can be said of the spec."""


class LocatedError(SubspanError):
    """A mistake in a file: `<file>:<line>:<column>: <message>`.

    Args:
        file: as the user named it.
        line, column: of the first character to blame, from 1.
        width: characters to blame on that line.
        message: what is wrong and what to do.
        reachable: False where the mistake is that something can't be reached.
    """

    def __init__(self, file: str, line: int, column: int, width: int, message: str, reachable: bool = True):
        super().__init__(f"{file}:{line}:{column}: {message}")
        self.file, self.line, self.column, self.width = file, line, column, width
        self.message = printable(message)
        self.reachable = reachable


class ManyErrors(SubspanError):
    """Several mistakes, in order; a line each.

    Args:
        errors: one or more.
    """

    def __init__(self, errors: Sequence[SubspanError]):
        super().__init__("\n".join(map(str, errors)))
        self.errors = tuple(errors)


def raise_all(errors: Sequence[SubspanError]) -> None:
    """Raise the errors together, one alone as it is; none, nothing."""
    if errors:
        raise errors[0] if len(errors) == 1 else ManyErrors(errors)


def reason(error: BaseException) -> str:
    """The first line that an exception says, or its type's name: libraries often say much more."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {rest[0]}" if first.endswith(":") and rest else first
