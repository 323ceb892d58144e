"""Rows that PEFT puts before keys and values, and the positions that they take."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from ..errors import SpecError, SubspanError
from ..graph.positions import by_table, check_angles, turn_of
from ..graph.sublayers import attentions
from ..graph.traced import TracedModel
from ..plan import Site


def attending(model: TracedModel) -> list[str]:
    """The modules of self-attention, in the graph's order."""
    found = attentions(next(iter(model.graphs.values())))
    return list(dict.fromkeys(one.module for one in found if not one.cross))


@contextmanager
def _said(count: int) -> Iterator[None]:
    """What a model's positions do that no transform does, with why it counts."""
    try:
        yield
    except SubspanError as error:
        raise SubspanError(f"PEFT's rows move the tokens on by {count} positions; in this model, {error}") from None


def moved(model: TracedModel, count: int) -> bool:
    """Whether rows take positions by the option, in a table; else keys are turned.

    Raises:
        SubspanError: what rows do to this model's positions, no transform does.
    """
    with _said(count):
        if not (table := by_table(model)):
            check_angles(model.config)
    return table


def turned(model: TracedModel, site: Site) -> Tensor:
    """What the positions of the rows at a site do to keys, as `Place.turn`.

    Raises:
        SubspanError: PEFT's rows move the tokens' positions, and here they do not.
    """
    with _said(site.rows):
        return turn_of(model, site.place, site.rows)


def check_rows(base: TracedModel, sites: list[Site]) -> None:
    """Refuse rows before keys and values that PEFT does not have, or whose positions it has otherwise.

    Raises:
        SubspanError: with which.
    """
    rows = [site for site in sites if site.kind in ("keys", "values")]
    wrong = ""
    if rows and sorted(site.place for site in rows) != sorted(2 * attending(base)):
        wrong = "PEFT has rows before the keys and values of every layer"
    elif rows and moved(base, rows[0].rows) != bool(rows[0].moves):
        option = rows[0].chain[0][0].peft.moves
        wrong = f"PEFT's rows take positions, in a table of these; here they do with {option}: true"
    if wrong:
        raise SpecError(f"{rows[0].label}: {wrong}", ("rules", rows[0].rule, "apply"))
