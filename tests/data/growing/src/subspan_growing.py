"""A package of transforms outside the tree: one whose rank grows, and one that stands on another's schedule."""

from dataclasses import dataclass

import torch

from rewriter.algebra import Dense, Diag, Operator
from rewriter.methods.adalora import adalora
from rewriter.transforms import Interval, Pool, Rank, Schedule, Scope, kaiming_uniform, transform


@dataclass(frozen=True)
class Grow(Schedule):
    """Every `interval` steps one more column is open at each site, until the loss has opened them all."""

    interval: int

    def before_step(self, pool: Pool) -> None:
        """Columns that wait are told by their gradients: a moving average of their lengths, in the state."""
        for one in pool:
            now = one["b"].grad.norm(dim=-1)
            one.state["wanted"] = 0.9 * one.state.get("wanted", torch.zeros_like(now)) + 0.1 * now

    def after_step(self, pool: Pool, step: int, steps: int) -> None:
        for one in pool:
            if step % self.interval == 0 and not bool(one["open"].all()):
                waiting = torch.where(one["open"] > 0, -1.0, one.state["wanted"].to(one["open"].dtype))
                one["open"][waiting.argmax()] = 1.0

    def settle(self, pool: Pool) -> None:
        for one in pool:
            kept = one["open"].nonzero().squeeze(-1)
            one.values["a"], one.values["b"] = one["a"].detach()[:, kept], one["b"].detach()[kept]
            one.sizes["rank"] = len(kept)


@transform("extension")
def growing_lora(w: Operator, site: Scope, *, rank: Rank, interval: Interval = 2) -> Operator:
    """W + A Diag(open) B; the rank grows from 1 to `rank`, a column every `interval` steps."""
    left = site.size("rank", -1)
    size = rank if left < 0 else left
    a = Dense(site.tuned("a", (site.n, size), kaiming_uniform))
    b = Dense(site.tuned("b", (size, site.m), 0.0))
    if left >= 0:
        return w + a @ b
    site.schedule(Grow(interval))
    first = lambda shape, generator: (torch.arange(shape[-1]) == 0).float().expand(shape).clone()  # noqa: E731
    return w + a @ Diag(site.chosen("open", rank, first, torch.float32)) @ b


@transform("extension")
def quiet_adalora(w: Operator, site: Scope, *, rank: Rank) -> Operator:
    """adalora without its penalty, down to half the rank."""
    return adalora(w, site, rank=rank, target_rank=max(1, rank // 2), mpc=None, start=0.0, end=0.3, interval=2)
