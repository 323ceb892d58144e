"""Any change of weights as a low-rank one: exact where its rank is bounded, else nearest by what layers see."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import SubspanError
from ..graph.traced import TracedModel, assign, copy_graph
from ..graph.weights import factored, uses
from ..plan import plan
from ..rewrite import rewrite
from ..spec import Rule
from ..transforms import TRANSFORMS, Transform, entire
from ..tuned import TunedModel
from .merge import changes, merged_weights

EXACT = 1e-7  # of the change's norm: what is left over is rounding of float32
_RIDGE = 1e-2  # of the mean square: directions that no row has still count a little


@dataclass(frozen=True)
class LowRank:
    """A weight's change as A B.

    Attributes:
        a, b: (n, r) and (r, m).
        exact: what is left over is rounding.
        error: what is left over of the change, relative: as far as the model's outputs feel it on the rows that were
            seen, or of its entries where there are none.
        norm: of the change D over the weight's.
    """

    a: Tensor
    b: Tensor
    exact: bool
    error: float
    norm: float


@dataclass(frozen=True)
class Seen:
    """What a layer sees: X^t X (n, n) of its inputs, and G^t G (m, m) of what the model's outputs feel of its own.

    Rows of G are gradients of random projections of the model's outputs, so G^t G is the layer's part of their
    Gauss-Newton matrix (K-FAC, arXiv 1503.05671).
    """

    inputs: Tensor
    outputs: Tensor


def nearest(change: Tensor, seen: Seen | None, rank: int | None, error: float) -> tuple[Tensor, Tensor, bool, float]:
    """The A (n, r) and B (r, m) for which X (D - A B) G^t is smallest in Frobenius' norm: by the singular value
    decomposition of L^t D R, L L^t = X^t X and R R^t = G^t G (Eckart and Young, doi 10.1007/BF02288367).

    Args:
        change: D (n, m), float64.
        seen: X^t X and G^t G, or None for I and I.
        rank: r at most; None: the rank of D where it is bounded (at most half of its smaller side), else the smallest r
            whose relative error is at most `error`.

    Returns:
        A, B, whether they are D, and the relative error.
    """
    u, s, vt = torch.linalg.svd(change, full_matrices=False)
    bound = max(1, int((_tails(s) > EXACT).sum()))
    exact = bound <= (rank or min(change.shape) // 2)
    left = right = None
    if seen is not None and not exact:
        left, right = _root(seen.inputs), _root(seen.outputs)
        u, s, vt = torch.linalg.svd(left.mT @ change @ right, full_matrices=False)
    kept = bound if exact else min(rank or max(1, int((_tails(s) > error).sum())), len(s))
    a, b = u[:, :kept] * s[:kept].sqrt(), s[:kept].sqrt().unsqueeze(-1) * vt[:kept]
    if left is not None:
        a = torch.linalg.solve_triangular(left.mT, a, upper=True)
        b = torch.linalg.solve_triangular(right, b, upper=False, left=False)
    return a, b, exact, float(_tails(s)[kept])


def _tails(s: Tensor) -> Tensor:
    """What is left over of singular values behind the first 0, 1, ... of them, relative."""
    return torch.cat([s.square().flip(0).cumsum(0).flip(0), s.new_zeros(1)]).sqrt() / s.norm().clamp_min(1e-300)


def _root(gram: Tensor) -> Tensor:
    """L, L L^t = G + a ridge."""
    ridge = _RIDGE * gram.diagonal().mean().clamp_min(1e-30)
    return torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))


def look(model: TunedModel, traced: TracedModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Seen]:
    """Weight -> what its linear ops see where the merged weights stand.

    Args:
        traced: the base.
        batches: of inputs, by name.
    """
    merged = traced.clone("eval")
    assign(merged, merged_weights(model))
    graph = copy_graph(traced.graphs["eval"])
    ops: dict[str, list[tuple[fx.Node, fx.Node]]] = {}
    for weight, sites in model.plan.by_weight().items():
        names = [name for name, first in traced.aliases.items() if first == traced.aliases[weight]]
        for node, user in uses(graph, names):
            if found := factored(user, node, sites[0].layout):
                ops.setdefault(weight, []).append((found[0], user))
    output = graph.output_node()
    pairs = [pair for both in ops.values() for pair in both]
    output.args = (([x for x, _ in pairs], [y for _, y in pairs], list(output.args[0])),)
    run = fx.GraphModule(merged, graph)
    run.requires_grad_(False)
    for weight in ops:
        merged.get_parameter(weight).requires_grad_(True)  # So that what follows has gradients.
    generator, sums = torch.Generator().manual_seed(0), {}
    for batch in batches:
        mask = batch.get("attention_mask")
        xs, ys, outs = run(*(batch[name] for name in traced.signatures["eval"].names))
        felt = [out for out in outs if isinstance(out, Tensor) and out.requires_grad]
        random = [torch.randn(out.shape, generator=generator, dtype=torch.float32).to(out) for out in felt]
        grads = torch.autograd.grad(felt, ys, random, allow_unused=True)
        found = iter(zip(xs, grads, strict=True))
        for weight, both in ops.items():
            for x, grad in (next(found) for _ in both):
                if grad is None:
                    continue
                for kind, value in (("x", x.detach()), ("y", grad)):
                    rows = _real(value, mask).double()
                    sums[weight, kind] = sums.get((weight, kind), 0) + rows.T @ rows / max(1, len(rows))
    return {weight: Seen(sums[weight, "x"], sums[weight, "y"]) for weight in ops if (weight, "x") in sums}


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of x that are no padding."""
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])


def as_low_rank(
    model: TunedModel,
    traced: TracedModel,
    rank: int | None,
    error: float,
    seen: Mapping[str, Seen],
    exact: Mapping[str, Tensor] | None = None,
    heads: Collection[str] = (),
) -> tuple[TunedModel, dict[str, LowRank]]:
    """A model whose changes of weights are low-rank terms, with newly made parameters as they are tuned.

    Args:
        model: from `rewrite` or `load_adapter`.
        traced: its base.
        rank, error: as of `nearest`.
        seen: from `look`; weights that it lacks take the unweighted norm.
        exact: weight -> its change in its own shape, where that is known better than from the model's tensors; what is
            no matrix is whole then.
        heads: modules that are whole, as PEFT saves them.

    Raises:
        SubspanError: something can't merge, or is no matrix.
    """
    one = _factored()
    (option,) = (name for name, key in one.peft.options.items() if key == "r")
    found: dict[str, LowRank] = {}
    apart = _kept_whole(model, heads) | set(model.plan.new)
    whole = [weight for weight in model.plan.by_weight() if weight in apart]
    for weight, sites, w, change in changes(model):
        if weight in whole:
            continue
        if sites[0].layout.vector or w.ndim > 2:
            if exact is not None:
                whole.append(weight)
                continue
            raise SubspanError(f"{sites[0].label}: it is no matrix, a low-rank term can't change it")
        if exact is not None:
            change = sites[0].layout.present(exact[weight]).dense()
        if change.any():
            made = nearest(change, seen.get(weight) if sites[0].linear else None, rank, error)
            found[weight] = LowRank(*made, float(change.norm() / w.norm()))
    if not found:
        raise SubspanError("no weight is changed")
    rules = [Rule(target=weight, apply=[{one.name: {option: how.a.shape[1]}}]) for weight, how in found.items()]
    merged = merged_weights(model)
    rules += [Rule(target=weight, apply=[entire().name]) for weight in whole]
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


def _kept_whole(model: TunedModel, heads: Collection[str]) -> set[str]:
    """Vectors that are tuned whole, and all of the heads that PEFT saves."""
    sites = [site for site in model.plan.sites if site.layout]
    vectors = {site.place for site in sites if site.layout.vector and [one for one, _ in site.chain] == [entire()]}
    return vectors | {site.place for site in sites if any(site.place.startswith(f"{head}.") for head in heads)}


def said_of(terms: Mapping[str, LowRank]) -> dict[str, dict[str, Any]]:
    """Weight -> r, exact, error and norm."""
    return {
        weight: {"r": one.a.shape[1], "exact": one.exact, "error": one.error, "norm": one.norm}
        for weight, one in terms.items()
    }


def _factored() -> Transform:
    return next(one for one in TRANSFORMS.values() if one.peft and one.peft.factors)
