"""The op table: the ops that a module may run, by name; the allow-list of the loader (ours).

All of them are pure functions of their arguments. How an op is cut is its rule in `nemo.cut.rules`;
an op without one runs at full width. A plugin may add ops of its own with `allow`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten

# These act element by element, with broadcasting.
POINTWISE = (
    aten.relu.default, aten.relu6.default, aten.gelu.default, aten.silu.default,
    aten.sigmoid.default, aten.tanh.default, aten.hardswish.default, aten.hardsigmoid.default,
    aten.hardtanh.default, aten.leaky_relu.default, aten.elu.default, aten.mish.default,
    aten.softplus.default, aten.selu.default, aten.celu.default, aten.log_sigmoid.default,
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar,
    aten.mul.Scalar, aten.div.Scalar, aten.neg.default, aten.abs.default, aten.exp.default,
    aten.log.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default,
    aten.square.default, aten.pow.Tensor_Scalar, aten.pow.Scalar, aten.pow.Tensor_Tensor,
    aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.maximum.default,
    aten.minimum.default, aten.where.self, aten.masked_fill.Scalar, aten.sin.default,
    aten.cos.default, aten.erf.default, aten.eq.Scalar, aten.ne.Scalar, aten.gt.Scalar,
    aten.lt.Scalar, aten.ge.Scalar, aten.le.Scalar, aten.logical_not.default, aten.sign.default,
    aten.to.dtype, aten._to_copy.default, aten.prelu.default, aten.special_expit.default,
    aten.dropout.default, aten.feature_dropout.default, aten.__and__.Tensor, aten.__or__.Tensor,
    aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_not.default,
    aten.logical_and.default, aten.logical_or.default, aten.eq.Tensor, aten.ne.Tensor,
    aten.gt.Tensor, aten.lt.Tensor, aten.ge.Tensor, aten.le.Tensor, aten.div.Tensor_mode,
    aten.masked_fill.Tensor, aten.where.ScalarOther, aten.where.ScalarSelf,
)  # fmt: skip

# These mix elements along dimensions: those they name, the last two, the last three.
OVER_AXES = (
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.mean.dim,
    aten.amax.default, aten.amin.default, aten.flip.default,
)  # fmt: skip
OVER_MAPS = (
    aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default,
    aten.upsample_nearest2d.default, aten.upsample_bilinear2d.default,
    aten.upsample_bicubic2d.default, aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.vec, aten.reflection_pad2d.default, aten.replication_pad2d.default,
)  # fmt: skip
OVER_VOLUMES = (
    aten.max_pool3d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool3d.default,
)  # fmt: skip

OTHERS = (
    aten.mul.Tensor, aten.div.Tensor, aten.type_as.default,
    # layers, norms, products
    aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv2d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
    aten.conv_transpose3d.input, aten.lstm.input, aten.batch_norm.default,
    aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default, aten.matmul.default,
    aten.scaled_dot_product_attention.default, aten.einsum.default, aten.baddbmm.default,
    aten.addmm.default, aten.addcmul.default,
    # moves of elements
    aten.reshape.default, aten.view.default, aten.permute.default, aten.expand.default,
    aten.slice.Tensor, aten.index_select.default, aten.unfold.default, aten.im2col.default,
    aten.col2im.default, aten.cat.default, aten.roll.default,
    aten.gather.default, aten.index.Tensor, aten.repeat.default, aten.repeat_interleave.self_int,
    aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.channel_shuffle.default,
    aten.grid_sampler.default, aten.select.int, aten.unbind.int, aten.split.Tensor,
    aten.chunk.default, aten.squeeze.dim, aten.unsqueeze.default, aten.new_zeros.default,
    aten.zeros_like.default,
    # along other dimensions
    aten.var.dim, aten.sum.dim_IntList, aten.linalg_vector_norm.default, aten.cumsum.default,
    aten.argsort.default, aten.argmax.default, aten.topk.default, aten.max.dim,
    aten.max_pool1d.default, aten.avg_pool1d.default, aten.adaptive_avg_pool1d.default,
    aten.adaptive_max_pool2d.default, aten.constant_pad_nd.default,
    aten.pad.default,
    # numbers: sizes that depend on the batch
    operator.getitem, aten.sym_size.int, operator.mul, operator.add, operator.sub,
    operator.floordiv,
)  # fmt: skip


def name_of(op: Any) -> str:
    """What an op is called in a file: `aten.relu.default`, or `mul` for arithmetic on sizes."""
    return op.__name__ if op.__class__.__module__ == "builtins" else str(op)


ALL = (*POINTWISE, *OVER_AXES, *OVER_MAPS, *OVER_VOLUMES, *OTHERS)
OPS: dict[str, Callable[..., Any]] = {name_of(op): op for op in ALL}


def allow(op: torch._ops.OpOverload) -> None:
    """Let modules run an op of a plugin, in this process.

    Raises:
        ValueError: it writes into its arguments.
    """
    if op._schema.is_mutable:
        raise ValueError(f"{op} writes into its arguments; accepted: ops that only return")
    OPS[name_of(op)] = op
