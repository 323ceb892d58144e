"""Bottlenecks: a narrow nonlinear map inside the residual of a sublayer, or beside a weight."""

from rewriter.algebra import Affine, Dense, Identity, Operator, Pointwise
from rewriter.methods.lora import scaled
from rewriter.transforms import Activation, Alpha, Rank, ScaleOf, Scope, Width, kaiming_uniform, transform


@transform("extension", on=("attention", "feed_forward"))
def hadapter(w: Operator, site: Scope, *, bottleneck: Width, activation: Activation = "relu") -> Operator:
    """y + h(yA + a)B + b on the outputs y of attention and feed-forward, inside the residual; B = 0. (27), ref. 22"""
    down = Affine(Dense(site.tuned("a", (site.m, bottleneck), kaiming_uniform)), site.tuned("a_bias", bottleneck, 0.0))
    up = Affine(Dense(site.tuned("b", (bottleneck, site.m), 0.0)), site.tuned("b_bias", site.m, 0.0))
    return w @ (Identity() + down @ Pointwise(activation) @ up)


@transform("extension", on=("feed_forward",))
def padapter(w: Operator, site: Scope, *, bottleneck: Width, activation: Activation = "relu") -> Operator:
    """y + h(yA + a)B + b on the output y of the feed-forward alone; B = 0 at the start. (27), ref. 72"""
    return hadapter(w, site, bottleneck=bottleneck, activation=activation)


@transform("extension", on=("matrix", "feed_forward"))
def pa(
    w: Operator,
    site: Scope,
    *,
    rank: Rank,
    alpha: Alpha = None,
    scale: ScaleOf = "fixed",
    activation: Activation = "relu",
) -> Operator:
    """xW + s h(xA)B, beside a weight or a whole feed-forward; A Kaiming-uniform and B = 0. (30)(31), ref. 18"""
    a = Dense(site.tuned("a", (site.n, rank), kaiming_uniform))
    b = Dense(site.tuned("b", (rank, site.m), 0.0))
    return w + scaled(site, rank, alpha, scale) * (a @ Pointwise(activation) @ b)
