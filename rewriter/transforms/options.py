"""Types of options that several transforms take: bounds, descriptions, and what a site's shape allows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

MOST = 2**24  # of any size or number in an option: more is a slip, and shapes have to stay countable


@dataclass(frozen=True)
class AtMost:
    """In an option's type: a site of shape (n, m) allows at most `bound(n, m)`."""

    bound: Callable[[int, int], int]


@dataclass(frozen=True)
class WhileTuning:
    """In an option's type: it counts while tuning alone, and says nothing of what is tuned."""


Rank = Annotated[
    int, Field(ge=1, le=MOST, description="rank r of the low-rank factors; at most min(n, m)"), AtMost(min)
]
Alpha = Annotated[
    float | None, Field(gt=0, description="numerator of the scale s = alpha / rank; default: the rank, so s = 1")
]
Probability = Annotated[
    float, Field(ge=0, lt=1, description="dropout probability on the input of the factors"), WhileTuning()
]
ScaleOf = Annotated[
    Literal["fixed", "rslora", "learned"],
    Field(description="s: fixed is alpha / rank, rslora alpha / sqrt(rank), learned a tuned scalar from alpha / rank"),
]
Constraint = Annotated[
    Literal["o", "d", "n"] | None,
    Field(description="matrix pattern constraint: penalty o (25) or d (26), or n, a nonlinearity between the factors"),
]
Coefficient = Annotated[float, Field(ge=0, description="weight of the penalty in the loss, per site"), WhileTuning()]
Activation = Annotated[Literal["relu", "gelu", "silu", "tanh"], Field(description="the nonlinearity h")]
TargetRank = Annotated[
    int | None, Field(ge=1, le=MOST, description="mean rank that is left; default: two thirds of rank")
]
HiddenWidth = Annotated[
    int | None, Field(ge=1, le=MOST, description="width of the MLP that makes P while tuning; none by default")
]
Width = Annotated[int, Field(ge=1, le=MOST, description="width of the bottleneck")]
Count = Annotated[int, Field(ge=1, le=MOST, description="how many of them")]
Length = Annotated[int, Field(ge=1, le=MOST, description="number of rows that are put before every sequence")]
Density = Annotated[float, Field(gt=0, le=1, description="share of the entries that are tuned")]
Samples = Annotated[int, Field(ge=1, le=MOST, description="training rows whose gradients decide")]
Interval = Annotated[int, Field(ge=1, le=MOST, description="optimiser steps from one decision to the next")]
Share = Annotated[float, Field(ge=0, lt=1, description="share of the optimiser steps")]
Positive = Annotated[float, Field(gt=0, description="a number above 0")]
Ratio = Annotated[
    float, Field(gt=0, description="learning rate of B over that of A (LoRA+, arXiv 2402.12354)"), WhileTuning()
]
Factor = Annotated[
    int | None, Field(ge=1, le=MOST, description="largest size of the left factor; default: the root of n, of m")
]
