"""Any change of weights as a low-rank one: exact where its rank is bounded, else the nearest for the layer's inputs."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from ..errors import SubspanError
from ..graph.traced import TracedModel, assign, copy_graph
from ..graph.weights import factored, uses
from ..plan import Site, plan, transformed
from ..rewrite import rewrite
from ..spec import Rule
from ..transforms import TRANSFORMS, Transform
from ..tuned import TunedModel, adapter_tensors, tuned_parameters
from .merge import merged_weights

EXACT = 1e-7  # of the change's norm: what is left over is rounding of float32
_TOLD = 4  # batches that tell whether refining came nearer
_RIDGE = 1e-6  # of the mean square of the inputs: directions that no row has still count a little


@dataclass(frozen=True)
class LowRank:
    """A weight's change as A B.

    Attributes:
        a, b: (n, r) and (r, m).
        exact: what is left over is rounding.
        error: of X (D - A B) over X D in Frobenius' norm, X the layer's inputs, or I where there are none.
        norm: of the change D over the weight's.
    """

    a: Tensor
    b: Tensor
    exact: bool
    error: float
    norm: float


def nearest(change: Tensor, gram: Tensor | None, rank: int | None, error: float) -> tuple[Tensor, Tensor, bool, float]:
    """The A (n, r) and B (r, m) for which X (D - A B) is smallest in Frobenius' norm: by the singular value
    decomposition of L^t D, L L^t = X^t X (Eckart and Young, doi 10.1007/BF02288367).

    Args:
        change: D (n, m), float64.
        gram: X^t X (n, n) over the number of rows, or None for I.
        rank: r at most; None: the rank of D where it is bounded (at most half of its smaller side), else the smallest r
            whose relative error is at most `error`.

    Returns:
        A, B, whether they are D, and the relative error.
    """
    left = None
    if gram is not None:
        ridge = _RIDGE * gram.diagonal().mean().clamp_min(1e-30)
        left = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    u, s, vt = torch.linalg.svd(change if left is None else left.mT @ change, full_matrices=False)
    tails = torch.cat([s.square().flip(0).cumsum(0).flip(0), s.new_zeros(1)]).sqrt() / s.norm().clamp_min(1e-300)
    bound = max(1, int((tails > EXACT).sum()))
    kept = min(rank or bound, bound)
    if rank is None and bound > min(change.shape) // 2:
        kept = max(1, int((tails > error).sum()))
    a = u[:, :kept] * s[:kept].sqrt()
    a = a if left is None else torch.linalg.solve_triangular(left.mT, a, upper=True)
    return a, s[:kept].sqrt().unsqueeze(-1) * vt[:kept], kept == bound, float(tails[kept])


@torch.no_grad()
def changes(model: TunedModel) -> Iterator[tuple[str, list[Site], Tensor, Tensor]]:
    """Weight, its sites, W (n, m) and phi(W) - W, in float64, of all that are no newly made parameters.

    Raises:
        SubspanError: something can't merge, or is no matrix.
    """
    leaves = adapter_tensors(model)
    for site in model.plan.sites:
        if not site.merges:
            raise SubspanError(f"{site.label}: {site.transform} can't merge, so it is no change of a weight")
    for weight, sites in model.plan.by_weight().items():
        if weight in model.plan.new:
            continue
        stored = model.get_parameter(weight).detach().double()
        w = sites[0].layout.present(stored).dense()
        if sites[0].layout.vector or w.ndim > 2:
            raise SubspanError(f"{sites[0].label}: it is no matrix, a low-rank term can't change it")
        made = transformed(sites, stored, lambda _, leaf: _wide(leaves[leaf.name].detach())).dense()
        yield weight, sites, w, made - w


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def grams(model: TunedModel, traced: TracedModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Weight -> X^t X (n, n) over the number of rows, X what linear ops read where the merged weights stand.

    Args:
        traced: the base.
        batches: of inputs, by name.
    """
    merged = traced.clone("eval")
    assign(merged, merged_weights(model))
    graph = copy_graph(traced.graphs["eval"])
    read: dict[str, list[fx.Node]] = {}
    for weight, sites in model.plan.by_weight().items():
        names = [name for name, first in traced.aliases.items() if first == traced.aliases[weight]]
        for node, user in uses(graph, names):
            if found := factored(user, node, sites[0].layout):
                read.setdefault(weight, []).append(found[0])
    output = graph.output_node()
    flat = [node for nodes in read.values() for node in nodes]
    output.args = (tuple(flat),)
    graph.eliminate_dead_code()
    run = fx.GraphModule(merged, graph)
    sums: dict[str, Tensor] = {}
    with torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask")
            found = iter(run(*(batch[name] for name in traced.signatures["eval"].names)))
            for weight, nodes in read.items():
                for x in (next(found) for _ in nodes):
                    rows = _real(x, mask).double()
                    sums[weight] = sums.get(weight, 0) + rows.T @ rows / max(1, len(rows))
    return sums


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of x that are no padding."""
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])


def as_low_rank(
    model: TunedModel, traced: TracedModel, rank: int | None, error: float, seen: Mapping[str, Tensor]
) -> tuple[TunedModel, dict[str, LowRank]]:
    """A model whose changes of weights are low-rank terms, with newly made parameters as they are tuned.

    Args:
        model: from `rewrite` or `load_adapter`.
        traced: its base.
        rank, error: as of `nearest`.
        seen: from `grams`; weights that it lacks take the unweighted norm.

    Raises:
        SubspanError: as `changes`.
    """
    one = _factored()
    (option,) = (name for name, key in one.peft.options.items() if key == "r")
    found: dict[str, LowRank] = {}
    for weight, sites, w, change in changes(model):
        if change.any():
            made = nearest(change, seen.get(weight) if sites[0].linear else None, rank, error)
            found[weight] = LowRank(*made, float(change.norm() / w.norm()))
    if not found:
        raise SubspanError("no weight is changed")
    rules = [Rule(target=weight, apply=[{one.name: {option: how.a.shape[1]}}]) for weight, how in found.items()]
    entire = next(other for other in TRANSFORMS.values() if other.peft and other.peft.whole)
    merged = merged_weights(model)
    whole = [weight for weight in model.plan.by_weight() if weight in model.plan.new]
    rules += [Rule(target=weight, apply=[entire.name]) for weight in whole]
    planned, values = plan(traced, rules, model.plan.new), {}
    for site in planned.sites:
        if site.place in found:
            how = found[site.place]
            values |= dict(
                zip((f"{site.name}.{one.name}.{leaf}" for leaf in one.peft.factors), (how.a, how.b), strict=True)
            )
        else:
            values[site.leaves[0].name] = site.layout.present(merged[site.place]).dense()
    return rewrite(traced, planned, values=values), found


def refine(model: TunedModel, target: TunedModel, batches: Iterable[Mapping[str, Tensor]], rate: float = 4e-3) -> bool:
    """Tune low-rank terms so that a model's outputs come near another's: AdamW on their mean squared distance, a step a
    batch, the rate falling to 0 as a cosine. Newly made parameters stay.

    Args:
        model: from `as_low_rank`; its low-rank terms are changed.
        target: what it stands for.
        batches: of inputs, by name; the first few also tell whether it came nearer.

    Returns:
        Whether it came nearer; if not, the terms are as they were.
    """
    own = {name for site in model.plan.sites if not site.replaces for name in site.tuned}
    terms = [value for name, value in tuned_parameters(model).items() if name in own]
    before, batches = [value.detach().clone() for value in terms], list(batches)

    def distance(batch: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            there = outputs_of(target, batch)
        return sum((a - b).square().mean() for a, b in zip(outputs_of(model, batch), there, strict=True))

    def far() -> float:
        with torch.no_grad():
            return sum(float(distance(batch)) for batch in batches[:_TOLD])

    optimiser, start = torch.optim.AdamW(terms, rate, weight_decay=0.0), far()
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, len(batches)))
    for batch in batches:
        optimiser.zero_grad()
        distance(batch).backward(inputs=terms)
        optimiser.step()
        falling.step()
    nearer = far() < start
    if not nearer:
        with torch.no_grad():
            for value, old in zip(terms, before, strict=True):
                value.copy_(old)
    return nearer


def outputs_of(model: TracedModel, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """What a model makes of a batch in eval mode: tensors of numbers."""
    found = pytree.tree_leaves(model.eval()(**batch))
    return [one for one in found if isinstance(one, Tensor) and one.is_floating_point()]


def _factored() -> Transform:
    return next(one for one in TRANSFORMS.values() if one.peft and one.peft.factors)
