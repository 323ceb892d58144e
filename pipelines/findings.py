"""What validation found, as people and services read it: text with the line itself, GitHub annotations, SARIF."""

import importlib.metadata
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rewriter.errors import LocatedError, ManyErrors, SubspanError, UnreachableError

SARIF = "https://json.schemastore.org/sarif-2.1.0.json"
KINDS = {
    "spec": "The spec is wrong: what it says can't be trained.",
    "unchecked": "The spec could not be checked: something that it names can't be reached from here.",
    "warning": "The plan is probably not what was meant.",
}
_LINE = 120


@dataclass(frozen=True)
class Finding:
    """One mistake or warning.

    Attributes:
        kind: of `KINDS`.
        file: as the user named it.
        line, column: from 1.
        width: characters to blame.
        message: what is wrong and what to do.
        placed: False where it is of no line of the file; line and column are 1 then.
    """

    kind: str
    file: str
    line: int
    column: int
    width: int
    message: str
    placed: bool = True

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message}" if self.placed else self.message

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": self.kind, "line": self.line, "column": self.column, "message": self.message}


def findings(error: SubspanError, file: str) -> list[Finding]:
    """The mistakes that an error tells of; `file` is where they are if it doesn't say."""
    if isinstance(error, ManyErrors):
        return [finding for one in error.errors for finding in findings(one, file)]
    if not isinstance(error, LocatedError):
        kind = "unchecked" if isinstance(error, UnreachableError) else "spec"
        return [Finding(kind, file, 1, 1, 1, _line(str(error)), placed=False)]
    kind = "spec" if error.reachable else "unchecked"
    return [Finding(kind, error.file, error.line, error.column, error.width, _line(error.message))]


def _line(text: str) -> str:
    return " ".join(text.split())


def to_text(finding: Finding) -> str:
    """One line, then the line of the file with a caret under what is to blame."""
    word = "warning" if finding.kind == "warning" else "error"
    if not finding.placed:
        return f"{word}: {finding}"
    try:
        lines = Path(finding.file).read_text(encoding="utf-8").splitlines()
        source = lines[finding.line - 1]
    except (OSError, ValueError, IndexError):
        return f"{word}: {finding}"
    start = max(0, finding.column - 1 - _LINE // 2) if len(source) > _LINE else 0
    shown = re.sub(r"[^ -\uffff]", " ", source[start : start + _LINE])
    carets = "^" * max(1, min(finding.width, len(source) - finding.column + 1, _LINE // 2))
    gutter = f"{finding.line:>6} | "
    return (
        f"{word}: {finding}\n{gutter}{shown}\n{' ' * (len(gutter) - 2)}| {' ' * (finding.column - 1 - start)}{carets}"
    )


def to_github(finding: Finding) -> str:
    """A workflow command that GitHub shows as an annotation of the line."""
    level = "warning" if finding.kind == "warning" else "error"
    place = {"file": finding.file, "line": finding.line, "col": finding.column}
    place |= {"endColumn": finding.column + finding.width, "title": f"subspan {finding.kind}"}
    properties = ",".join(f"{key}={_escaped(str(value), ':,')}" for key, value in place.items())
    return f"::{level} {properties}::{_escaped(finding.message)}"


def _escaped(text: str, more: str = "") -> str:
    return "".join(f"%{ord(char):02X}" if char in "%\r\n" + more else char for char in text)


def to_sarif(found: Iterable[Finding]) -> dict[str, Any]:
    """A SARIF 2.1.0 log of one run."""
    return {
        "$schema": SARIF,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "subspan",
                        "version": importlib.metadata.version("subspan"),
                        "rules": [{"id": kind, "shortDescription": {"text": text}} for kind, text in KINDS.items()],
                    }
                },
                "columnKind": "unicodeCodePoints",
                "results": [_result(finding) for finding in found],
            }
        ],
    }


def _result(finding: Finding) -> dict[str, Any]:
    region = {
        "startLine": finding.line,
        "startColumn": finding.column,
        "endColumn": finding.column + finding.width,
    }
    file = Path(finding.file)
    artifact = {"uri": file.as_uri() if file.is_absolute() else quote(file.as_posix())}
    return {
        "ruleId": finding.kind,
        "level": "warning" if finding.kind == "warning" else "error",
        "message": {"text": finding.message},
        "locations": [{"physicalLocation": {"artifactLocation": artifact, "region": region}}],
    }
