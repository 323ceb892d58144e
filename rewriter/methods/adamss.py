"""AdaMSS: clusters of outputs, each with a low-rank term of its own in the principal subspace."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.algebra import Dense, Operator
from rewriter.transforms import Count, Peft, Place, Rank, Scope, Stored, transform

# Of vectors that are orthonormal: what rounding to bfloat16 leaves, and other libraries' order of sums.
_SAME = 2e-2


def _labels(rows: Tensor, k: int, **more: int | str) -> Tensor:
    from sklearn.cluster import KMeans  # Only a spec with this method waits for it.

    found = KMeans(k, **{"n_init": 4, "random_state": 0} | more).fit_predict(rows.cpu().numpy())
    return torch.from_numpy(found).long()


def _directions(rows: Tensor, label: Tensor, k: int, q: int) -> Tensor:
    return torch.stack([torch.linalg.svd(rows[label == i])[2][:q].T for i in range(k)])


def _drawn(config: Mapping, at: Place) -> Tensor:
    """The clusters that PEFT finds of a weight with its bias as one more column, by a decomposition that it draws."""
    bias = () if at.bias is None else (at.bias[:, None],)
    whole = torch.cat([at.weight.mT, *bias], dim=1).float().cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["random_seed"])
        u, _, v = torch.svd_lowrank(whole, q=min(config["r"], *whole.shape), niter=2)
    held = at.further.get("adamss_newB")
    own = v.mT[:, : at.n]  # What stands for the bias may be another, of an adapter that was written here.
    if held is not None and (held.shape != v.mT.shape or (held[:, : at.n].cpu() - own).abs().max() > _SAME):
        raise ValueError("adamss_newB is not what the weight gives here, so its clusters are not known")
    k = min(config["num_subspaces"], at.m)
    found = _labels(u, k, init="random", n_init=1, max_iter=10, random_state=123456789)
    return found.to(at.weight.device)


def _read(_: Mapping, tensors: Mapping) -> dict[str, int]:
    a, b = tensors["a"], tensors["b"]
    if [one.shape[0] for one in a] != [one.shape[1] for one in b]:
        raise ValueError("adamss_A and adamss_B are of clusters of other ranks")
    return {"rank": len(tensors["u"]), "subspaces": len(a), "subspace_rank": max(map(len, a))}


def _padded(parts: tuple[Tensor, ...], at: Place) -> Tensor:
    """(clusters, r, q) of each cluster's (q_c, r)."""
    wide = min(at.options.subspace_rank, at.options.rank)
    return torch.stack([F.pad(part.mT, (0, wide - len(part))) for part in parts])


def _spread(parts: tuple[Tensor, ...], at: Place) -> Tensor:
    """(m, q) of each cluster's (outputs, q_c), which it must be as large as."""
    cluster, wide = at.values["cluster"], min(at.options.subspace_rank, at.options.rank)
    if [len(part) for part in parts] != cluster.bincount(minlength=len(parts)).tolist():
        raise ValueError("adamss_B has clusters of other sizes than the weight gives here")
    value = parts[0].new_zeros(at.m, wide)
    for i, part in enumerate(parts):
        value[cluster == i, : part.shape[1]] = part
    return value


def _split(at: Place) -> list[tuple[Tensor, Tensor]]:
    """A (q_c, r) and B (outputs, q_c) of each cluster, q_c at most its outputs."""
    a, b, cluster = (at.values[name] for name in ("a", "b", "cluster"))
    pairs = []
    for i in range(len(a)):
        left, right = a[i].mT, b[cluster == i]
        most = min(left.shape[0], len(right))
        if (left[most:].any(1) & right[:, most:].any(0)).any():  # More directions than outputs: one of each output.
            left, right = right @ left, torch.eye(len(right)).to(right)
        pairs.append((left[:most], right[:, :most]))
    return pairs


def _moved(at: Place) -> Tensor:
    """M transposed, (m, r)."""
    a, b, cluster = (at.values[name] for name in ("a", "b", "cluster"))
    return (a[cluster] @ b.unsqueeze(-1)).squeeze(-1)


def _biased(bias: Tensor, at: Place) -> Tensor:
    last = at.further["adamss_newB"] if "adamss_newB" in at.further else bias.new_zeros(at.options.rank, at.n + 1)
    return bias + _moved(at) @ last[:, -1].to(bias) if last.shape[1] > at.n else bias


def _bias_parts(before: Tensor, after: Tensor, at: Place) -> dict[str, Tensor]:
    """The bias's column of the basis: it has to say what became of the bias."""
    moved, change = _moved(at).double(), (after - before).double()
    column = torch.linalg.lstsq(moved.cpu(), change.unsqueeze(-1).cpu(), driver="gelsd").solution.to(moved)
    if ((moved @ column).squeeze(-1) - change).norm() > 1e-6 * max(change.norm(), before.norm()):
        raise ValueError("PEFT changes the layer's bias too, otherwise than it is tuned here")
    basis = at.values["u"][:, : at.options.rank].mT
    return {"adamss_newB": torch.cat([basis, column.to(basis)], dim=1)}


@transform(
    "extension",
    peft=Peft(
        "ADAMSS",
        {
            "u": Stored(
                "adamss_newB",
                lambda value, at: F.pad(value[:, : at.n].mT, (0, min(at.n, at.m) - len(value))),
                lambda value, at: value[:, : at.options.rank].mT,
            ),
            "a": Stored("adamss_A", _padded, lambda _, at: tuple(a for a, _ in _split(at)), parts=True),
            "b": Stored("adamss_B", _spread, lambda _, at: tuple(b for _, b in _split(at)), parts=True),
        },
        {"rank": "r", "subspaces": "num_subspaces", "subspace_rank": "subspace_rank"},
        read=_read,
        write=lambda _: {"random_seed": 0, "use_asa": False, "use_dynamic_rank": False},
        made={"cluster": _drawn},
        ignored=frozenset(
            {
                "asa_importance_beta",
                "asa_schedule_exponent",
                "asa_target_subspaces",
                "asa_uncertainty_beta",
                "final_warmup",
                "init_warmup",
                "mask_interval",
                "random_seed",
                "svd_threshold",
                "use_asa",
                "use_dynamic_rank",
            }
        ),
        bias=_biased,
        bias_parts=_bias_parts,
    ),
)
def adamss(w: Operator, site: Scope, *, rank: Rank, subspaces: Count = 5, subspace_rank: Count = 1) -> Operator:
    """W + Ur M, column j of M is A_c b_j, c the cluster of output j by the rows of Vr; A (clusters, r, q) their main
    directions and B (m, q) = 0 at the start. openreview 8ZdWmpYxT0 (NeurIPS 2025); without its pruning of clusters"""
    u, _, vt = site.svd()
    k, q = min(subspaces, site.m), min(subspace_rank, rank)
    flat = vt[..., :rank, :].transpose(-2, -1).reshape(-1, site.m, rank)
    label = lambda shape, _: torch.stack([_labels(x, k) for x in flat]).reshape(shape)  # noqa: E731
    cluster = site.chosen("cluster", site.m, label, below=k)
    pairs = lambda: zip(flat, cluster.reshape(-1, site.m), strict=True)  # noqa: E731
    main = lambda shape, _: torch.stack([_directions(x, c, k, q) for x, c in pairs()]).reshape(shape)  # noqa: E731
    a, b = site.tuned("a", (k, rank, q), main), site.tuned("b", (site.m, q), 0.0)
    own = a.gather(-3, cluster[..., None, None].expand(*site.shape[:-2], site.m, rank, q)) @ b.unsqueeze(-1)
    return w + Dense(u[..., :rank]) @ Dense(own.squeeze(-1).transpose(-2, -1))
