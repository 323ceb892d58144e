"""The algebra of linear operators in which every transform is written.

y = xW with W of shape (..., n, m), leading dimensions a batch of matrices; operators hold tensors, and compute a
result, or shapes alone on the meta device.
"""

from .maps import NONLINEARITIES, Affine, Computed, Dropout, Pointwise, Prepend, moved_by, rows_of
from .norms import column_norm, detach
from .operators import Concat, Dense, Diag, Identity, Operator, Product, Scale, Sum, tensors_of
from .quantised import Format, Quantised
from .stored import Elsewhere, Stored, as_dense, held_bytes, maker_of, parts_of
from .structured import Blocks, Circulant, Hadamard, Kronecker, Patch, Shuffle

__all__ = [
    "NONLINEARITIES",
    "Affine",
    "Blocks",
    "Circulant",
    "Computed",
    "Concat",
    "Dense",
    "Diag",
    "Dropout",
    "Elsewhere",
    "Format",
    "Hadamard",
    "Identity",
    "Kronecker",
    "Operator",
    "Patch",
    "Pointwise",
    "Prepend",
    "Product",
    "Quantised",
    "Scale",
    "Shuffle",
    "Stored",
    "Sum",
    "as_dense",
    "column_norm",
    "detach",
    "held_bytes",
    "maker_of",
    "moved_by",
    "parts_of",
    "rows_of",
    "tensors_of",
]
