"""Optimisers and learning-rate schedules by name, and what an optimiser keeps of a tensor."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import SpecError, reason
from ..spec import Train
from ..tuned import TunedModel, tuned_parameters

MOMENTUM = 0.9
PLATEAU = "reduce_lr_on_plateau"
# As transformers.Trainer has them.
_UNDECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


@dataclass(frozen=True)
class Kind:
    """A kind of optimiser.

    Attributes:
        make: from parameter groups and a learning rate.
        entries: how many entries of state a tensor of a shape has.
    """

    make: Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]
    entries: Callable[[Sequence[int]], int]


def _adafactor(groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False)


def _factored(shape: Sequence[int]) -> int:
    """A row and a column of every matrix, or an entry for every entry of a vector (Adafactor, arXiv 1804.04235)."""
    *batch, n, m = shape if len(shape) > 1 else (1, 0, math.prod(shape))
    return math.prod(batch) * (n + m)


OPTIMISERS = {
    "adamw": Kind(
        lambda groups, rate: torch.optim.AdamW(groups, lr=rate, fused=True), lambda shape: 2 * math.prod(shape)
    ),
    "sgd": Kind(lambda groups, rate: torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM), math.prod),
    "adafactor": Kind(_adafactor, _factored),
}


def make_optimiser(model: TunedModel, settings: Train) -> torch.optim.Optimizer:
    """The optimiser of a spec over the tuned tensors; biases and norms are not decayed, leaves keep their own rates."""
    from transformers.trainer_pt_utils import get_parameter_names

    decayed = set(get_parameter_names(model, [nn.LayerNorm], _UNDECAYED))
    rates = {leaf.name: leaf.rate for site in model.plan.sites for leaf in site.leaves}
    own = {model.root + name: (p, rates[name]) for name, p in tuned_parameters(model).items()}
    groups = [
        {"params": members, "weight_decay": decay, "lr": rate * settings.learning_rate}
        for decays, decay in ((True, settings.weight_decay), (False, 0.0))
        for rate in sorted({rate for _, rate in own.values()})
        if (members := [p for name, (p, its) in own.items() if its == rate and (name in decayed) == decays])
    ]
    return OPTIMISERS[settings.optimiser].make(groups, settings.learning_rate)


def make_schedule(settings: Train, optimiser: torch.optim.Optimizer, steps: int, lower: bool) -> Any:
    """The learning rate's schedule over `steps` optimiser steps.

    Args:
        lower: whether less of the validation metric is better, for a schedule that follows it.

    Raises:
        SpecError: an option is none of the schedule's, or not such a value.
    """
    from transformers import get_scheduler

    options, warm = dict(settings.schedule_options), settings.schedule == "constant"
    if options and settings.schedule.startswith("constant"):
        raise SpecError(f"{settings.schedule} has no options", ("train", "schedule_options"))
    if settings.schedule == PLATEAU:
        options = {"mode": "min" if lower else "max", **options}
    name = "constant_with_warmup" if warm else settings.schedule
    try:
        return get_scheduler(name, optimiser, math.ceil(settings.warmup * steps), steps, options)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise SpecError(f"{settings.schedule}: {reason(error)}", ("train", "schedule_options")) from None


def check_schedule(settings: Train, lower: bool) -> None:
    """Try the schedule and its options on an optimiser of nothing much.

    Raises:
        SpecError: an option is none of the schedule's, or not such a value, or one that it needs is missing.
    """
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=settings.learning_rate)
    schedule = make_schedule(settings, optimiser, 10, lower)
    try:
        for _ in range(10):  # Some divide by what is left of the steps.
            optimiser.step()
            schedule.step(*([0.0] if settings.schedule == PLATEAU else []))
    except Exception as error:
        raise SpecError(f"{settings.schedule}: {reason(error)}", ("train", "schedule_options")) from None
