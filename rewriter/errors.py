"""The errors a user can mend: the command line prints each as one line and exits with status 1."""


class SubspanError(Exception):
    """An expected failure whose message says what to do."""


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


class AdapterError(SubspanError):
    """An adapter can't be read, or doesn't fit its base model."""


class TrainingError(SubspanError):
    """Training can't go on."""


class VerificationError(SubspanError):
    """Two stages that must agree do not."""


def reason(error: BaseException) -> str:
    """The first line that an exception says, or its type's name: libraries often say much more."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
