"""Greedy decoding: the likeliest next token of every row of a batch, up to what ends it."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import SubspanError

Ids = Sequence[Sequence[int]]
# New tokens of each row (its whole start at first, then one, none of a row that has ended) -> logits (rows, vocabulary)
# of the token after them. It knows what it was given before.
Following = Callable[[Ids], Tensor]
# What each row is about -> what gives its tokens, and what every row's text starts with.
Opening = Callable[[Ids], tuple[Following, Ids]]


class Said(NamedTuple):
    """The tokens that go on a row, without the one that ends it, and whether one did; else there were as many as there
    may be."""

    ids: list[int]
    ended: bool


@torch.no_grad()
def greedy(
    following: Following,
    starts: Ids,
    ends: Collection[int],
    tokens: int,
    longest: int | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> list[Said]:
    """What goes on each row, by the likeliest token each time.

    Args:
        following: made for these rows; each has a token at least.
        starts: the rows' first tokens.
        ends: tokens that end a row.
        tokens: the most of a row that are new.
        longest: the most of a row with its start; None: any.
        tell: gets each new token with its row's number as it comes.
    """
    most = [max(0, min(tokens, (longest or len(one) + tokens) - len(one))) for one in starts]
    found: list[list[int]] = [[] for _ in starts]
    ended, new = [False] * len(starts), list(starts)
    going = [i for i, n in enumerate(most) if n]
    while going:
        likeliest = following(new).argmax(-1).tolist()
        new = [[] for _ in starts]
        for i in going:
            ended[i] = likeliest[i] in ends
            if not ended[i]:
                new[i] = [likeliest[i]]
                found[i].append(likeliest[i])
                if tell is not None:
                    tell(i, likeliest[i])
        going = [i for i in going if not ended[i] and len(found[i]) < most[i]]
    return [Said(*one) for one in zip(found, ended, strict=True)]


def cached(run: Callable[[Tensor, Tensor, Any], tuple[Any, Any]]) -> Following:
    """By a model that keeps what it has read; rows are padded on the left.

    Args:
        run: ids (rows, new), mask (rows, all) and what it kept, None at first -> logits (rows, new, vocabulary), and
            what it keeps.
    """
    mask, past = None, None

    def following(new: Ids) -> Tensor:
        nonlocal mask, past
        width = max(map(len, new))
        ids = torch.tensor([[*[0] * (width - len(one)), *one] for one in new])
        own = torch.tensor([[*[0] * (width - len(one)), *[1] * len(one)] for one in new])
        mask = own if mask is None else torch.cat([mask, own], dim=1)
        logits, past = run(ids, mask, past)
        return torch.as_tensor(logits)[:, -1]

    return following


def again(forward: Callable[[Tensor, Tensor], Tensor]) -> Following:
    """By a model that reads all tokens each time; rows are padded on the right, where it moves no position.

    Args:
        forward: ids and mask (rows, all) -> logits (rows, all, vocabulary).
    """
    texts: list[list[int]] = []

    def following(new: Ids) -> Tensor:
        texts[:] = _longer(texts, new)
        logits = forward(*right(texts))
        return logits[torch.arange(len(texts)), torch.tensor([len(one) - 1 for one in texts])]

    return following


def _longer(texts: Ids, new: Ids) -> list[list[int]]:
    """Texts with what is new of each; at first there are none."""
    return [[*old, *one] for old, one in zip(texts or [[]] * len(new), new, strict=True)]


def either(first: Following, second: Following) -> Following:
    """By the first, and from where it can't go on (SubspanError) by the second, which reads all from there."""
    texts: list[list[int]] = []
    failed = False

    def following(new: Ids) -> Tensor:
        nonlocal failed
        texts[:] = _longer(texts, new)
        if failed:
            return second(new)
        try:
            return first(new)
        except SubspanError:
            failed = True
            return second(texts)

    return following


def right(rows: Ids) -> tuple[Tensor, Tensor]:
    """Ids and mask, (rows, longest), padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([[*one, *[0] * (width - len(one))] for one in rows])
    mask = torch.tensor([[*[1] * len(one), *[0] * (width - len(one))] for one in rows])
    return ids, mask
