"""PEANuT: a small network whose input is the frozen weight makes the change."""

from typing import Annotated

from pydantic import Field

from rewriter.algebra import NONLINEARITIES, Dense, Operator
from rewriter.transforms import Activation, Peft, Positive, Rank, Scope, kaiming_uniform, transform, transposed

_DEEPEST = 16
Depth = Annotated[int, Field(ge=0, le=_DEEPEST, description="pairs of square layers between the outer two")]


@transform(
    "extension",
    peft=Peft(
        "PEANUT",
        {"a": transposed("peanut_A.weight"), "b": transposed("peanut_B.weight")}
        | {
            f"{part}_{i}": transposed(f"peanut_{part}s.{i}.weight", needed=False)
            for part in ("encoder", "decoder")
            for i in range(_DEEPEST)
        },
        {"rank": "r", "depth": "depth", "activation": "act_fn", "scale": "scaling"},
    ),
)
def peanut(
    w: Operator, site: Scope, *, rank: Rank, depth: Depth = 1, activation: Activation = "relu", scale: Positive = 1.0
) -> Operator:
    """W + s net(W) B, net(W) = h(h(WA) E_1 ...) D_1 ... with residuals, A (m, r), `depth` E and D (r, r); B = 0.
    arXiv 2410.01870"""
    h, square = NONLINEARITIES[activation], (rank, rank)
    x, kept = h(w.dense() @ site.tuned("a", (site.m, rank), kaiming_uniform)), []
    for i in range(depth):
        kept.append(x)
        x = h(x @ site.tuned(f"encoder_{i}", square, kaiming_uniform))
    for i in range(depth):
        x = h(x @ site.tuned(f"decoder_{i}", square, kaiming_uniform)) + kept.pop()
    return w + scale * (Dense(x) @ Dense(site.tuned("b", (rank, site.m), 0.0)))
