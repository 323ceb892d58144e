"""All passes, in the order in which they run. A new one is a file and a line here."""

from .base import Pass
from .clean.copy_contiguous import copy_contiguous
from .clean.follow_device import follow_device
from .clean.remove_checks import remove_checks
from .clean.remove_dead import remove_dead
from .clean.remove_identities import remove_identities
from .fuse.accumulate import accumulate
from .fuse.accumulate_in_place import accumulate_in_place
from .fuse.causal import causal
from .fuse.defer_head import defer_head
from .fuse.fold_frozen import fold_frozen
from .fuse.group_heads import group_heads
from .fuse.keep_results import keep_results
from .fuse.keep_rows import keep_rows
from .fuse.recompute_gates import recompute_gates
from .fuse.recompute_operands import recompute_operands
from .fuse.recompute_transforms import recompute_transforms
from .fuse.share_inputs import share_inputs
from .fuse.small_masks import small_masks
from .fuse.transpose_factors import transpose_factors
from .insert.add_penalties import add_penalties
from .insert.insert_attention_rows import insert_attention_rows
from .insert.insert_sublayers import insert_sublayers
from .insert.insert_token_rows import insert_token_rows
from .insert.insert_weights import insert_weights

PASSES: tuple[Pass, ...] = (
    Pass(remove_checks, ("trace",)),
    Pass(insert_sublayers, ("rewrite",), "inserting"),
    Pass(insert_attention_rows, ("rewrite",), "inserting"),
    Pass(insert_token_rows, ("rewrite",), "inserting"),
    Pass(insert_weights, ("rewrite",), "inserting"),
    Pass(add_penalties, ("rewrite",), "inserting"),
    Pass(remove_identities, ("rewrite",)),
    Pass(share_inputs, ("rewrite",)),
    Pass(accumulate, ("rewrite",)),
    Pass(follow_device, ("trace", "rewrite")),
    Pass(remove_dead, ("trace", "rewrite")),
    Pass(causal, ("train",)),
    Pass(group_heads, ("train",)),
    Pass(recompute_gates, ("train",)),
    Pass(fold_frozen, ("train",)),
    Pass(transpose_factors, ("train",)),
    Pass(recompute_transforms, ("train",)),
    Pass(recompute_operands, ("train",)),
    Pass(accumulate_in_place, ("train",)),
    Pass(keep_results, ("train",)),
    Pass(small_masks, ("train",)),
    Pass(defer_head, ("train",)),
    Pass(copy_contiguous, ("export",)),
    Pass(keep_rows, ("export",)),
)
