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
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default, aten.rrelu.default, aten.threshold.default,
    aten.hardshrink.default, aten.softshrink.default, aten.expm1.default, aten.exp2.default,
    aten.log1p.default, aten.log2.default, aten.log10.default, aten.tan.default, aten.asin.default,
    aten.acos.default, aten.atan.default, aten.atan2.default, aten.sinh.default, aten.cosh.default,
    aten.asinh.default, aten.erfc.default, aten.erfinv.default, aten.lgamma.default,
    aten.digamma.default, aten.logit.default, aten.sinc.default, aten.floor.default,
    aten.ceil.default, aten.round.default, aten.round.decimals, aten.trunc.default,
    aten.frac.default, aten.sgn.default, aten.nan_to_num.default, aten.isnan.default,
    aten.isinf.default, aten.isfinite.default, aten.clip.default, aten.clamp.Tensor,
    aten.max.other, aten.min.other, aten.fmax.default, aten.fmin.default, aten.fmod.Scalar,
    aten.fmod.Tensor, aten.remainder.Scalar, aten.remainder.Tensor, aten.floor_divide.default,
    aten.div.Tensor_mode, aten.div.Scalar_mode, aten.hypot.default, aten.copysign.Tensor,
    aten.lerp.Scalar, aten.lerp.Tensor, aten.addcdiv.default, aten.logaddexp.default,
    aten.xlogy.Tensor, aten.heaviside.default, aten.eq.Tensor, aten.ne.Tensor, aten.gt.Tensor,
    aten.lt.Tensor, aten.ge.Tensor, aten.le.Tensor, aten.logical_and.default,
    aten.logical_or.default, aten.logical_xor.default, aten.bitwise_not.default,
    aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor, aten.__and__.Tensor,
    aten.__or__.Tensor, aten.__xor__.Tensor, aten.masked_fill.Tensor, aten.where.ScalarSelf,
    aten.where.ScalarOther, aten.where.Scalar, aten.ones_like.default, aten.full_like.default,
    aten.fill.Scalar, aten.fill.Tensor,
)  # fmt: skip

# These mix elements along dimensions: those they name, the last one, two or three.
OVER_AXES = (
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.mean.dim,
    aten.amax.default, aten.amin.default, aten.flip.default, aten.cumprod.default,
    aten.logcumsumexp.default,
)  # fmt: skip
OVER_MAPS = (
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_bilinear2d.default,
    aten.upsample_bicubic2d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.vec,
    aten.reflection_pad2d.default,
    aten.replication_pad2d.default,
    aten._upsample_nearest_exact2d.vec,
    aten._upsample_bilinear2d_aa.vec,
    aten._upsample_bicubic2d_aa.vec,
    aten.triu.default,
    aten.tril.default,
)
OVER_LINES = (
    aten.max_pool1d.default, aten.avg_pool1d.default, aten.adaptive_avg_pool1d.default,
    aten.upsample_nearest1d.vec, aten._upsample_nearest_exact1d.vec, aten.upsample_linear1d.vec,
    aten.reflection_pad1d.default, aten.replication_pad1d.default,
)  # fmt: skip
OVER_VOLUMES = (
    aten.max_pool3d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool3d.default,
    aten.upsample_nearest3d.vec, aten._upsample_nearest_exact3d.vec,
    aten.upsample_trilinear3d.vec, aten.reflection_pad3d.default, aten.replication_pad3d.default,
)  # fmt: skip

OTHERS = (
    aten.mul.Tensor, aten.div.Tensor, aten.type_as.default,
    # layers, norms, products
    aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding, aten.conv_transpose1d.default,
    aten.conv_transpose2d.input, aten.conv_transpose3d.input, aten.lstm.input, aten.gru.input,
    aten.rnn_tanh.input, aten.rnn_relu.input, aten.lstm_cell.default, aten.gru_cell.default,
    aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default, aten.embedding.default,
    aten.batch_norm.default, aten.instance_norm.default, aten.layer_norm.default,
    aten.group_norm.default, aten.rms_norm.default, aten.matmul.default, aten.bmm.default,
    aten.mm.default, aten.mv.default, aten.dot.default, aten.outer.default, aten.bilinear.default,
    aten._trilinear.default, aten.tensordot.default, aten.cdist.default,
    aten.cosine_similarity.default, aten.pairwise_distance.default, aten.cross.default,
    aten.scaled_dot_product_attention.default, aten.einsum.default, aten.baddbmm.default,
    aten.addmm.default, aten.addcmul.default,
    # moves of elements
    aten.reshape.default, aten.view.default, aten.permute.default, aten.expand.default,
    aten.slice.Tensor, aten.index_select.default, aten.unfold.default, aten.im2col.default,
    aten.col2im.default, aten.cat.default, aten.roll.default, aten.narrow.default,
    aten.tensor_split.sections,
    aten.gather.default, aten.index.Tensor, aten.repeat.default, aten.repeat_interleave.self_int,
    aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.channel_shuffle.default,
    aten.grid_sampler.default, aten.select.int, aten.unbind.int, aten.split.Tensor,
    aten.chunk.default, aten.squeeze.dim, aten.unsqueeze.default, aten.new_zeros.default,
    aten.zeros_like.default, aten.new_ones.default, aten.new_full.default, aten.transpose.int,
    aten.squeeze.default, aten.squeeze.dims, aten.stack.default, aten.split_with_sizes.default,
    aten.tile.default, aten.rot90.default, aten.diagonal.default, aten.diag_embed.default,
    aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two,
    aten.index_add.default, aten.index_copy.default, aten.index_fill.int_Scalar,
    aten.index_put.default, aten.slice_scatter.default, aten.select_scatter.default,
    aten.take.default, aten.take_along_dim.default, aten.one_hot.default, aten.clone.default,
    aten.copy.default, aten.hstack.default, aten.affine_grid_generator.default,
    # along other dimensions
    aten.var.dim, aten.sum.dim_IntList, aten.linalg_vector_norm.default, aten.cumsum.default,
    aten.argsort.default, aten.topk.default, aten.sort.default, aten.argmax.default,
    aten.argmin.default, aten.max.dim, aten.min.dim, aten.median.dim, aten.kthvalue.default,
    aten.quantile.scalar, aten.cummax.default, aten.cummin.default, aten.diff.default,
    aten.prod.dim_int, aten.any.dim, aten.all.dim, aten.logsumexp.default, aten.std.dim,
    aten.var.correction, aten.std.correction, aten.var_mean.dim, aten.std_mean.dim,
    aten.var_mean.correction, aten.std_mean.correction, aten.aminmax.default,
    aten.norm.ScalarOpt_dim, aten.nanmean.default, aten.nansum.default,
    aten.count_nonzero.dim_IntList, aten.glu.default, aten.max_pool1d_with_indices.default,
    aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default,
    aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default, aten.constant_pad_nd.default, aten.pad.default,
    aten.linalg_inv.default, aten.linalg_solve.default, aten.linalg_det.default,
    # spectra
    aten.fft_fft.default, aten.fft_ifft.default, aten.fft_rfft.default, aten.fft_irfft.default,
    aten.fft_fft2.default, aten.fft_ifft2.default, aten.fft_rfft2.default, aten.fft_irfft2.default,
    aten.view_as_real.default, aten.view_as_complex.default, aten.real.default, aten.imag.default,
    aten.polar.default,
    # numbers: sizes that depend on the batch
    operator.getitem, aten.sym_size.int, aten.sym_numel.default, operator.mul, operator.add,
    operator.sub, operator.floordiv, operator.truediv,
)  # fmt: skip


def name_of(op: Any) -> str:
    """What an op is called in a file: `aten.relu.default`, or `mul` for arithmetic on sizes."""
    return op.__name__ if op.__class__.__module__ == "builtins" else str(op)


ALL = (*POINTWISE, *OVER_AXES, *OVER_LINES, *OVER_MAPS, *OVER_VOLUMES, *OTHERS)
OPS: dict[str, Callable[..., Any]] = {name_of(op): op for op in ALL}


def allow(op: torch._ops.OpOverload) -> None:
    """Let modules run an op of a plugin, in this process.

    Raises:
        ValueError: it writes into its arguments.
    """
    if op._schema.is_mutable:
        raise ValueError(f"{op} writes into its arguments; accepted: ops that only return")
    OPS[name_of(op)] = op
