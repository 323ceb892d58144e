"""What a plan costs: multiplications and the rank of the change per site, memory and multiplications of a whole step.

Everything is computed on the meta device: the very expressions and graphs run, on shapes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..algebra import Dense, Operator, Patch, Sum, parts_of
from ..errors import SpecError
from ..graph.ops import SDPA
from ..graph.traced import TracedModel
from ..spec.limits import Limits
from ..transforms import Leaf, Transform, compose
from .site import PARAMETERS, Plan, Site


@dataclass(frozen=True)
class SiteCost:
    """What one site adds.

    Attributes:
        rank: bound on the rank of phi(W) - W; None where phi(W) is no matrix.
        forward, backward: added FLOPs of products over those of the frozen op, as a share: 0.05 is 5 % more. The frozen
            op's backward is the gradient of its input alone. None where the frozen op is no linear one.
    """

    rank: int | None
    forward: float | None
    backward: float | None


@dataclass(frozen=True)
class StepCost:
    """What one training step needs.

    Attributes:
        activations: bytes that the forward saves for the backward.
        layers: how many layers are computed again in the backward.
        optimiser: bytes of the tuned tensors' gradients and of the optimiser's state, at the tuned tensors' width.
        flops: of the step's products.
        processes, weights: how many processes share a batch, and bytes of weights on each one's device; the rest is of
            one of them.
        offloaded: how many layers' weights stay in the CPU's memory.
        overhead: FLOPs of the step's products over those of the frozen model's forward and input gradient (twice its
            forward), less 1.
    """

    activations: int
    optimiser: int
    overhead: float
    layers: int = 0
    flops: int = 0
    processes: int = 1
    weights: int = 0
    offloaded: int = 0


def exceeded(limits: Limits, plan: Plan, step: StepCost | None = None) -> list[SpecError]:
    """A mistake at each limit that a plan, or its step, exceeds."""
    measured: list[tuple[str, float, float | None, str]] = [
        (name, getattr(plan, name), limits.parameters(name, plan.total_parameters), "{:,.0f} parameters")
        for name in ("trainable_parameters", "head_parameters")
    ]
    again = ""
    if step:
        again = f", even with all {step.layers} layers computed again" if step.layers else ""
        measured.append(("activation_memory", step.activations, limits.activations, "{:,.0f} bytes"))
        measured.append(("overhead_flops", step.overhead, limits.overhead, "{:.2%}"))
    return [
        SpecError(
            f"the plan has {shown.format(value)}, more than the limit of {shown.format(limit)}"
            + again * (name == "activation_memory"),
            ("limits", name),
        )
        for name, value, limit, shown in measured
        if limit is not None and value > limit
    ]


def site_cost(site: Site, tokens: int) -> SiteCost:
    """The cost of a site whose op reads `tokens` rows of n entries per step."""
    return _site_cost(site.kind, site.shape, site.chain, tokens, site.linear)


@lru_cache(maxsize=1024)
def _site_cost(
    kind: str, shape: tuple[int, ...], chain: tuple[tuple[Transform, BaseModel], ...], tokens: int, linear: bool
) -> SiteCost:
    def lookup(leaf: Leaf) -> Tensor:
        return leaf.empty("meta").requires_grad_(leaf.role == "tuned")

    if kind not in PARAMETERS:
        return SiteCost(None, None, None)
    *batch, n, m = shape
    w = Dense(torch.empty(*batch, m, n, device="meta"), transposed=True)
    op = compose(chain, w, shape, lookup, "w", kind)
    try:
        op.dense()
        rank = change_bound(op, w)
    except NotImplementedError:
        rank = None
    if not linear:
        return SiteCost(rank, None, None)
    x = torch.empty(*batch, tokens, n, device="meta", requires_grad=True)
    frozen, added = _flops(w, x), _flops(op, x)
    return SiteCost(rank, *(after / before - 1 for before, after in zip(frozen, added, strict=True)))


def _flops(op: Operator, x: Tensor) -> tuple[int, int]:
    with FlopCounterMode(display=False) as forward:
        y = op.apply(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def change_bound(op: Operator, w: Operator) -> int:
    """A bound on the rank of op - w, for an expression in w; min(n, m) at most.

    Raises:
        NotImplementedError: op is no matrix.
    """
    size = min(op.dense().shape[-2:])
    if op is w:
        return 0
    if isinstance(op, Patch):
        return min(size, change_bound(op.operand, w) + op.values.shape[-1])
    if isinstance(op, Sum):
        own = [one for one in op.operands if _contains(one, w)]
        rest = sum(one.rank_bound() for one in op.operands if not _contains(one, w))
        return min(size, change_bound(own[0], w) + rest) if len(own) == 1 else size
    return size


def _contains(op: object, w: Operator) -> bool:
    if op is w:
        return True
    if isinstance(op, tuple):
        return any(_contains(one, w) for one in op)
    return is_dataclass(op) and any(_contains(getattr(op, field.name), w) for field in fields(op))


def step_cost(
    frozen: TracedModel,
    tuned: TracedModel,
    batch: Mapping[str, Tensor],
    objective: Callable[[TracedModel, Mapping[str, Tensor]], Tensor],
    entries: Callable[[Sequence[int]], int],
) -> StepCost:
    """The cost of a step of a rewritten model on a batch; all on the meta device, in the model's own storage type.

    Attention counts as the CPU computes it: fused without dropout, as products with it. Fused attention on CUDA saves
    less with dropout.

    Args:
        frozen: the traced model.
        tuned: what `rewrite` makes of it.
        batch: as the data's, labels too.
        objective: (model, batch) -> loss.
        entries: how many entries of state the optimiser has for a tensor of a shape.
    """
    with torch.no_grad():
        forward = products(lambda: objective(frozen.train(), batch))
    activations = saved_bytes(tuned, batch, objective)

    def step() -> None:
        loss = objective(tuned.train(), batch)
        (loss + sum(tuned.penalties.values())).backward()

    flops = products(step)
    width = sum((p.numel() + entries(p.shape)) * p.element_size() for p in tuned.parameters() if p.requires_grad)
    tuned.zero_grad(set_to_none=True)
    return StepCost(activations, width, flops / (2 * forward) - 1, flops=flops)


def products(run: Callable[[], Any]) -> int:
    """FLOPs of the matrix products of a run."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flop}) as counter:
        run()
    return counter.get_total_flops()


def _addmm_flop(total: Sequence[int], rows: Sequence[int], factor: Sequence[int], **_: Any) -> int:
    """Of shapes; PyTorch counts the op that makes a new tensor alone."""
    return 2 * rows[0] * factor[0] * factor[1]


def saved_bytes(
    model: TracedModel, batch: Mapping[str, Tensor], objective: Callable[[TracedModel, Mapping[str, Tensor]], Tensor]
) -> int:
    """Bytes that a forward of a model on the meta device, in train mode, would save on a CPU; arguments as of
    `step_cost`."""
    return kept_bytes(_fused(model), batch, objective)


def kept_bytes(
    model: nn.Module, batch: Mapping[str, Tensor], objective: Callable[[Any, Mapping[str, Tensor]], Tensor]
) -> int:
    """Bytes that a forward saves for its backward: storages, each once, other than of parameters, buffers and batch."""
    given = (*model.parameters(), *model.buffers(), *batch.values())
    known = {_storage(part) for tensor in given for part in parts_of(tensor)}
    saved: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        for part in parts_of(tensor):
            if _storage(part) not in known:
                saved[_storage(part)] = part, part.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective(model, batch)
    return sum(size for _, size in saved.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _fused(model: TracedModel) -> TracedModel:
    """The model with attention as the op that a CPU picks, which the meta device would not."""
    out = model.clone("train").train()
    for node in out.graphs["train"].find_nodes(op="call_function", target=SDPA):
        node.target = _attention
    out.recompile()
    return out


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    if dropout_p:
        return SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
