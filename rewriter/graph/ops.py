"""Kinds of ops: which of PyTorch's mean the same to whoever reads a graph."""

import torch

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
ADDS = {aten.add.Tensor, aten.add_.Tensor}
SOFTMAX = {aten.softmax.int, aten._softmax.default}
# They change type or memory, not values.
PASSING = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.contiguous.default, aten.detach.default}
# They change a tensor's shape or strides, or copy it.
VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.contiguous.default, aten.clone.default,
    aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default, aten.expand.default,
    aten.unsqueeze.default, aten.slice.Tensor, aten.alias.default, aten.transpose.int, aten.permute.default,
}  # fmt: skip
SCALINGS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
# They swap two dimensions: of a weight on its way to a product.
TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default, aten.mT.default}
# What attention adds to its scores, or masks them by.
BIASES = {
    *ADDS, aten.sub.Tensor, aten.masked_fill.Tensor, aten.masked_fill.Scalar, aten.where.self, aten.where.ScalarOther,
    aten.where.ScalarSelf,
}  # fmt: skip
# Products of two activations -> position of the first.
PRODUCTS = {aten.matmul.default: 0, aten.bmm.default: 0, aten.baddbmm.default: 1}
# Products with a weight -> position of the input.
LINEARS = {aten.linear.default: 0, aten.addmm.default: 1, aten.mm.default: 0}
# Products of two matrices, as transforms insert them.
MATRIX_PRODUCTS = {aten.matmul.default, aten.mm.default}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "convolution", "_convolution"}
# They read a weight as a table, row by row.
ROWS = {"embedding", "embedding_bag", "layer_norm", "output"}
PRODUCT_NAMES = {"mm", "bmm", "matmul", "addmm", "baddbmm", "_grouped_mm", "grouped_mm", "grouped_mm_fallback"}
