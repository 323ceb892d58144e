"""C3A: a change of circulant blocks."""

import torch

from rewriter.algebra import Dense, Operator
from rewriter.transforms import Scope, Width, transform


@transform("extension")
def c3a(w: Operator, site: Scope, *, block: Width = 8) -> Operator:
    """W + 1/n C, blocks of C circulant: C[i, j] = c[(i - j) mod b]; c = 0 at the start. arXiv 2407.19342"""
    c = site.tuned("c", (site.divided(block, "outputs"), site.divided(block), block), 0.0)
    steps = torch.arange(block, device=c.device)
    turned = ((steps.unsqueeze(1) - steps) % block).flatten()
    blocks = c.index_select(-1, turned).unflatten(-1, (block, block)).movedim(-4, -2)
    return w + (1 / site.n) * Dense(blocks.flatten(-4, -3).flatten(-2))
