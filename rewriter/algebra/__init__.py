"""The algebra of linear operators in which every transform is written.

y = xW with W of shape (..., n, m), leading dimensions a batch of matrices; operators hold tensors, and compute a
result, or shapes alone on the meta device.
"""

from .maps import NONLINEARITIES, Affine, Computed, Dropout, Pointwise, Prepend, rows_of
from .norms import column_norm, detach
from .operators import Concat, Dense, Diag, Identity, Operator, Product, Scale, Sum, tensors_of
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
    "Hadamard",
    "Identity",
    "Kronecker",
    "Operator",
    "Patch",
    "Pointwise",
    "Prepend",
    "Product",
    "Scale",
    "Shuffle",
    "Sum",
    "column_norm",
    "detach",
    "rows_of",
    "tensors_of",
]
