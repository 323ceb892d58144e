"""AdaMSS: clusters of outputs, each with a low-rank term of its own in the principal subspace."""

import torch
from torch import Tensor

from rewriter.algebra import Dense, Operator
from rewriter.transforms import Count, Rank, Scope, transform


def _labels(rows: Tensor, k: int) -> Tensor:
    from sklearn.cluster import KMeans  # Only a spec with this method waits for it.

    return torch.from_numpy(KMeans(k, n_init=4, random_state=0).fit_predict(rows.cpu().numpy())).long()


def _directions(rows: Tensor, label: Tensor, k: int, q: int) -> Tensor:
    return torch.stack([torch.linalg.svd(rows[label == i])[2][:q].T for i in range(k)])


@transform("extension")
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
