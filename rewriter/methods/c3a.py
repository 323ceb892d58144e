"""C3A: a change of circulant blocks."""

from rewriter.algebra import Circulant, Operator
from rewriter.transforms import Peft, Scope, Width, same, transform


@transform(
    "extension",
    peft=Peft(
        "C3A",
        {"c": same("c3a_kernel")},
        {"block": "block_size"},
        patterns={"block_size": "block_size_pattern"},
        after_dot=True,
    ),
)
def c3a(w: Operator, site: Scope, *, block: Width = 8) -> Operator:
    """W + 1/n C, blocks of C circulant: C[i, j] = c[(i - j) mod b]; c = 0 at the start. arXiv 2407.19342"""
    c = site.tuned("c", (site.divided(block, "outputs"), site.divided(block), block), 0.0)
    return w + (1 / site.n) * Circulant(c)
