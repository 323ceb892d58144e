"""LoRA-Dash: the directions that LoRA has changed most are tuned by themselves too. arXiv 2409.01035"""

from dataclasses import dataclass

import torch

from rewriter.algebra import Dense, Diag, Operator
from rewriter.methods.lora import scaled
from rewriter.transforms import Alpha, Count, Pool, Rank, Schedule, Scope, Share, kaiming_uniform, transform


@dataclass(frozen=True)
class Launch(Schedule):
    """After the first `start` of the steps the directions are chosen; their coordinates stay 0 until then."""

    start: float

    def after_step(self, pool: Pool, step: int, steps: int) -> None:
        launch = round(self.start * steps)
        if step > launch:
            return
        with torch.no_grad():
            for one in pool:
                one["d"].zero_()
                if step == launch:
                    u, s, vt = one["u"], one["s"], one["vt"]
                    change = (u * (one["a"] @ (one["b"] @ vt.transpose(-2, -1)))).sum(-2).abs()
                    indices = one["indices"]
                    indices.copy_((change / (s + 1e-6)).topk(indices.shape[-1]).indices)


@transform("extension")
def lora_dash(
    w: Operator, site: Scope, *, rank: Rank, alpha: Alpha = None, directions: Count = 8, start: Share = 0.1
) -> Operator:
    """W + s A B + Ui Diag(d) Vi^t, i the `directions` that A B has changed most after the first `start` of the steps.

    Change is |u_i^t A B v_i| over the singular value; d = 0 until then. By the source's authors, arXiv 2409.01035.
    """
    site.schedule(Launch(start))
    u, _, vt = site.svd()
    count = min(directions, site.n, site.m)
    first = lambda shape, generator: torch.arange(count).expand(shape)  # noqa: E731
    indices = site.chosen("indices", count, first, below=min(site.n, site.m), distinct=True)
    d = site.tuned("d", count, 0.0)
    batch = site.shape[:-2]
    left = u.gather(-1, indices.unsqueeze(-2).expand(*batch, site.n, count))
    right = vt.gather(-2, indices.unsqueeze(-1).expand(*batch, count, site.m))
    a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
    b = Dense(site.tuned("b", (rank, site.m), 0.0))
    return w + scaled(site, rank, alpha) * (a @ b) + Dense(left) @ Diag(d) @ Dense(right)
