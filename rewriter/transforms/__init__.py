"""Transforms: each is one short function from an operator to an operator, registered by its name.

All that an author needs is here and in `rewriter.algebra`: the decorator, the scope, types of options, start values,
and the base of schedules.
"""

from .leaf import Leaf, decompose, initial_value
from .options import (
    Activation,
    Alpha,
    AtMost,
    Coefficient,
    Constraint,
    Count,
    Density,
    Factor,
    HiddenWidth,
    Interval,
    Length,
    Positive,
    Probability,
    Rank,
    Ratio,
    Samples,
    ScaleOf,
    Share,
    TargetRank,
    Width,
)
from .registry import CLASSES, TRANSFORMS, Transform, compose, named, transform
from .schedule import Member, Pool, Schedule, largest
from .scope import KINDS, Scope
from .start import choice, eye, he_uniform, kaiming_uniform, normal

__all__ = [
    "CLASSES",
    "KINDS",
    "TRANSFORMS",
    "Activation",
    "Alpha",
    "AtMost",
    "Coefficient",
    "Constraint",
    "Count",
    "Density",
    "Factor",
    "HiddenWidth",
    "Interval",
    "Leaf",
    "Length",
    "Member",
    "Pool",
    "Positive",
    "Probability",
    "Rank",
    "Ratio",
    "Samples",
    "ScaleOf",
    "Schedule",
    "Scope",
    "Share",
    "TargetRank",
    "Transform",
    "Width",
    "choice",
    "compose",
    "decompose",
    "eye",
    "he_uniform",
    "initial_value",
    "kaiming_uniform",
    "largest",
    "named",
    "normal",
    "transform",
]
