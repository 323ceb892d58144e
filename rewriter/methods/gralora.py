"""GraLoRA: a low-rank term for every block of the weight."""

from rewriter.algebra import Blocks, Operator, Shuffle
from rewriter.errors import SpecError
from rewriter.methods.lora import scaled
from rewriter.transforms import Alpha, Count, Peft, Rank, Scope, kaiming_uniform, same, transform


@transform(
    "extension",
    peft=Peft(
        "GRALORA",
        {"a": same("gralora_A"), "b": same("gralora_B")},
        {"rank": "r", "alpha": "alpha", "blocks": "gralora_k"},
        write=lambda options: {"alpha": options.alpha or options.rank},
    ),
)
def gralora(w: Operator, site: Scope, *, rank: Rank, blocks: Count = 2, alpha: Alpha = None) -> Operator:
    """W + s Blocks(A) P Blocks(B), P a shuffle: W's k x k blocks have changes of rank r / k each; A Kaiming-uniform,
    B = 0 at the start. arXiv 2505.20355"""
    n, m = site.divided(blocks), site.divided(blocks, "outputs")
    if rank % blocks:
        raise SpecError(f"gralora: rank {rank} is not divided by {blocks} blocks")
    a = Blocks(site.tuned("a", (blocks, n, rank), kaiming_uniform))
    b = Blocks(site.tuned("b", (blocks, rank, m), 0.0))
    return w + scaled(site, rank, alpha) * (a @ Shuffle(blocks, blocks, rank // blocks) @ b)
