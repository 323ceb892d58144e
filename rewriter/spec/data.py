"""The data of a spec: where rows lie, which of them are read, and what their columns are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from ..errors import SpecError, reason
from .limits import Count, Scalar, Seed, Strict

MADE = "messages"  # The column of chats that are made of other columns.
Files = str | list[str]
# What `datasets` reads from files, less the formats that run queries or load pickles.
Format = Literal["csv", "json", "parquet", "arrow", "text", "imagefolder"]
Place = tuple[str | int, ...]


class Split(Strict):
    """A share of the training data held out."""

    validation: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] = Field(
        description="rows (an integer) or share (a fraction) to hold out"
    )
    seed: Seed = Field(0, description="seed of the shuffle before the split")


class Limit(Strict):
    """At most so many rows."""

    train: Count | None = Field(None, description="rows of training data; default: all")
    validation: Count | None = Field(None, description="rows of validation data; default: all")


class Turns(Strict):
    """How a column writes turns, where it is not as templates do, e.g. {role: from, content: value}."""

    role: str = Field("role", min_length=1, description="what a turn's role is called")
    content: str = Field("content", min_length=1, description="what its text is called")
    roles: dict[str, str] = Field(default_factory=dict, description="role as written -> role as templates call it")


def fields_of(text: str) -> list[str]:
    """The columns that a text names, in order: {column}; {{ and }} are braces of its own.

    Raises:
        ValueError: it is written otherwise.
    """
    expected = "expected a text in which {column} stands for a cell, and {{ and }} for braces"
    try:
        parts = list(Formatter().parse(text))
    except ValueError:
        raise ValueError(expected) from None
    if any(name == "" or form or converted for _, name, form, converted in parts):
        raise ValueError(expected)
    return [name for _, name, _, _ in parts if name is not None]


def filled(text: str, cells: Mapping[str, str]) -> str:
    """A text with the cells of a row in the places of the columns that it names."""
    return "".join(own + ("" if name is None else cells[name]) for own, name, _, _ in Formatter().parse(text))


def _text(text: str) -> str:
    fields_of(text)
    return text


def _template(given: str) -> str:
    """What has a brace in it is a chat template, anything else a file of one."""
    if "{" in given:
        return given
    if not Path(given).is_file():
        raise ValueError(f"{given}: no such file (a template that is written here itself has a brace)")
    try:
        text = Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{given}: {reason(error)}") from None
    if "{" not in text:
        raise ValueError(f"{given} holds no chat template")
    return text


Text = Annotated[str, AfterValidator(_text)]
Template = Annotated[str, Field(min_length=1), AfterValidator(_template)]
ChatTurn = Annotated[dict[Literal["system", "developer", "user", "assistant"], Text], Field(min_length=1, max_length=1)]


def named_in(chat: Sequence[Mapping[str, str]]) -> dict[str, Place]:
    """The columns that turns name, in order -> where in the data section each is named first."""
    found: dict[str, Place] = {}
    for i, turn in enumerate(chat):
        for role, text in turn.items():
            for column in fields_of(text):
                found.setdefault(column, ("chat", i, role))
    return found


def _columns_may_be_made(schema: dict[str, Any]) -> None:
    """`chat` and `mixture` make columns: an editor is not to ask for them."""
    schema["required"] = [name for name in schema.get("required", []) if name != "columns"]
    if not schema["required"]:
        del schema["required"]


class Source(Strict):
    """Rows of files or of a hub, and what their columns are."""

    model_config = ConfigDict(json_schema_extra=_columns_may_be_made)

    format: Format | None = Field(None, description="how `files` are read")
    options: dict[str, Scalar | list[Scalar]] = Field(
        default_factory=dict, description="of that reader, e.g. {sep: ';', column_names: [id, label, text]} for csv"
    )
    files: Files | dict[Literal["train", "validation"], Files] | None = Field(
        None, description="paths or package:// resources, or {train: ..., validation: ...}"
    )
    name: str | None = Field(None, description="hub id of a data set, instead of `format` and `files`")
    config: str | None = Field(None, description="configuration of the hub data set")
    where: dict[str, str | int | float | bool | list[str | int | bool]] = Field(
        default_factory=dict, description="keep rows whose column equals the value, or is in the list"
    )
    columns: dict[str, str] = Field(description="role -> column; which roles there are, the task says")
    turns: Turns | None = Field(None, description="how turns are written; default: {role: ..., content: ...}")
    chat: list[ChatTurn] | None = Field(
        None, min_length=1, description="turns made of columns, {role: text}: {column} in a text stands for its cell"
    )
    values: dict[str, dict[str | int | bool, str]] = Field(
        default_factory=dict, description="column of `chat` -> cell as written -> text that stands for it"
    )

    @model_validator(mode="before")
    @classmethod
    def _made(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("chat") is not None and "columns" not in given:
            return given | {"columns": {MADE: MADE}}
        return given

    @model_validator(mode="after")
    def _whole(self) -> "Source":
        self._check()
        return self

    def _check(self) -> None:
        """Keys that do not go together (ValueError)."""
        if (self.files is None) == (self.name is None):
            raise ValueError("give either `format` and `files`, or `name` of a hub data set")
        if self.files is not None and self.format is None:
            raise ValueError("`files` needs a `format`, e.g. csv")
        if clash := {"data_files", "data_dir", "name", "path", "split", "trust_remote_code"} & self.options.keys():
            raise ValueError(f"`options` are of the format's reader; it has no {min(clash)!r}")
        if self.chat is None:
            if self.values:
                raise ValueError("`values` are of the columns that `chat` names; there is no `chat`")
            return
        if MADE not in self.columns:
            raise ValueError("`chat` makes the messages: leave out `columns`")
        named = named_in(self.chat)
        if both := sorted({column for role, column in self.columns.items() if role != MADE} & named.keys()):
            raise ValueError(f"`columns` and `chat` both read {both[0]!r}: tools are no text")
        if self.turns is not None:
            raise ValueError("`turns` is for a column of turns; `chat` makes them of others")
        if "assistant" not in self.chat[-1] or len(self.chat) == 1:
            raise ValueError("the last turn of `chat` is the assistant's, and others come before it")
        for column in self.values:
            if column not in named:
                raise ValueError(f"`values` has {column!r}, which no turn of `chat` names")

    @property
    def reads(self) -> dict[str, Place]:
        """The columns that are read -> where the data section names them."""
        found: dict[str, Place] = {}
        for role, column in self.columns.items():
            if self.chat is None or role != MADE:
                found.setdefault(column, ("columns", role))
        return found | named_in(self.chat or [])

    @property
    def asked(self) -> list[str]:
        """The columns that `chat` names before the assistant's last turn: what is known when it is asked."""
        return list(named_in((self.chat or [])[:-1]))


class Part(Source):
    """One of the data sets of a mixture."""

    weight: Annotated[float, Field(ge=1e-3, le=1e3)] | None = Field(
        None, description="of its rows among the training rows; given for all parts or for none"
    )


def _roles(part: dict) -> list[str]:
    """As a part that is not checked yet names them."""
    columns = part.get("columns")
    return list(columns) if isinstance(columns, dict) and columns else [MADE]


_OWN = ("format", "options", "files", "name", "config", "where", "turns", "chat", "values")


class Data(Source):
    """The data set, as `datasets.load_dataset` reads it, or a mixture of several."""

    mixture: list[Part] | None = Field(None, min_length=2, description="several data sets, each with keys of its own")
    split: Split | None = Field(None, description="hold out a part of the training data")
    limit: Limit = Field(Limit(), description="use only so many rows, after filter and split")
    max_length: Count = Field(128, le=2**20, description="longest sequence, in tokens")
    long: Literal["truncate", "split", "refuse"] = Field(
        "truncate", description="what becomes of longer texts; `split`: several rows"
    )
    template: Template | None = Field(
        None, description="chat template, or a file of one, which is read with the spec; default: the tokenizer's"
    )
    loss: Literal["assistant", "completion", "all"] | None = Field(
        None, description="which tokens are learnt; default: the assistant's turns, or the completion, or else all"
    )

    @model_validator(mode="before")
    @classmethod
    def _mixed(cls, given: Any) -> Any:
        """The columns of a mixture are the roles of its parts."""
        parts = given.get("mixture") if isinstance(given, dict) else None
        if not isinstance(parts, list) or "columns" in given:
            return given
        roles = {role: role for part in parts if isinstance(part, dict) for role in _roles(part)}
        return given | {"columns": roles}

    def _check(self) -> None:
        if self.mixture is None:
            super()._check()
            return
        for key in _OWN:
            if getattr(self, key):
                raise SpecError("give it in each part of the mixture", ("data", key), at_key=True)
        for i, part in enumerate(self.mixture):
            if (roles := set(part.columns)) != set(self.mixture[0].columns):
                first = ", ".join(self.mixture[0].columns)
                said = f"{', '.join(sorted(roles))} here, {first} in the first part: all parts have the same roles"
                odd = roles ^ set(self.mixture[0].columns)
                said += "; tools may be null, in a column of such rows" * ("tools" in odd)
                raise SpecError(said, ("data", "mixture", i, "columns"))
            if (part.weight is None) != (self.mixture[0].weight is None):
                raise SpecError("give all parts a weight, or none", ("data", "mixture", i))
        if self.columns != {role: role for role in self.mixture[0].columns}:
            raise SpecError("give them in each part of the mixture", ("data", "columns"), at_key=True)

    @property
    def sources(self) -> list[Source]:
        """The parts of a mixture, or the data alone."""
        return list(self.mixture) if self.mixture else [self]

    def of_part(self, part: Part) -> "Data":
        """The data as it were if it had one part of its mixture alone."""
        own = {key: getattr(part, key) for key in Source.model_fields}
        return self.model_copy(update=own | {"mixture": None})
