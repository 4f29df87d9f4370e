"""The op table: every op that a decomposed module may run, and its rule (ours).

An op that is not here is refused when an artefact is saved or loaded; an op whose rule is the base
`Rule` is exact, but stops savings. All of them are pure functions of their arguments.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from nemo.cut.facts import Analysis, inputs_of
from nemo.cut.graph import arg, aten, lstm_outputs
from nemo.cut.rules.attention import Attention, MatMul
from nemo.cut.rules.base import Along, Cast, GetItem, OneInput, Pointwise, Rule, Total
from nemo.cut.rules.layers import Conv, Linear
from nemo.cut.rules.moves import (
    Cat,
    Expand,
    Gather,
    Overlay,
    Patches,
    Permute,
    Reshape,
    Slice,
    Unfold,
)
from nemo.cut.rules.norms import (
    BatchNorm,
    GroupNorm,
    LayerNorm,
    NarrowLayerNorm,
    narrow_layer_norm,
)
from nemo.cut.rules.recurrent import Lstm


def _last(count: int) -> Along:
    return Along(lambda node, rank: list(range(rank - count, rank)))


def _axes(position: int, default: Any = None, kind: type[Along] = Along) -> Along:
    """Along the dimension, or the dimensions, in one argument; all of them if it is empty."""

    def mixed(node: fx.Node, rank: int) -> list[int]:
        axes: Any = node.args[position] if len(node.args) > position else default
        axes = [axes] if isinstance(axes, int) else axes
        return list(axes) if axes else list(range(rank))

    return kind(mixed)


def _padded(node: fx.Node, rank: int) -> list[int]:
    """The dimensions that are padded: sizes come in pairs, from the last dimension backwards."""
    sizes: Any = node.args[1]
    pairs = [sizes[i : i + 2] for i in range(0, len(sizes), 2)]
    return [rank - 1 - i for i, pair in enumerate(pairs) if any(pair)]


POINTWISE = [
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
]  # fmt: skip

RULES: dict[Any, Rule] = {
    **dict.fromkeys(POINTWISE, Pointwise()),
    aten.mul.Tensor: Pointwise("product"),
    aten.div.Tensor: Pointwise("quotient"),
    **dict.fromkeys([aten.dropout.default, aten.feature_dropout.default], Pointwise()),
    aten.reshape.default: Reshape(),
    aten.permute.default: Permute(),
    aten.expand.default: Expand(),
    aten.slice.Tensor: Slice(),
    aten.index_select.default: Gather(),
    aten.unfold.default: Unfold(),
    aten.im2col.default: Patches(),
    aten.col2im.default: Overlay(),
    aten.cat.default: Cat(),
    operator.getitem: GetItem(),
    aten.type_as.default: Cast(),
    aten.linear.default: Linear(),
    aten.conv1d.default: Conv(1),
    aten.conv2d.default: Conv(2),
    aten.conv3d.default: Conv(3),
    aten.conv2d.padding: Conv(2),
    aten.batch_norm.default: BatchNorm(),
    aten.layer_norm.default: LayerNorm(),
    aten.group_norm.default: GroupNorm(),
    aten.matmul.default: MatMul(),
    aten.scaled_dot_product_attention.default: Attention(),
    **dict.fromkeys([aten.softmax.int, aten._softmax.default, aten.log_softmax.int], _axes(1)),
    **dict.fromkeys(
        [aten.mean.dim, aten.var.dim, aten.amax.default, aten.amin.default], _axes(1)
    ),
    aten.sum.dim_IntList: _axes(1, kind=Total),
    aten.linalg_vector_norm.default: _axes(2, kind=Total),
    aten.roll.default: _axes(2),
    aten.flip.default: _axes(1),
    **dict.fromkeys([aten.constant_pad_nd.default, aten.pad.default], Along(_padded)),
    **dict.fromkeys([aten.max_pool1d.default, aten.avg_pool1d.default], _last(1)),
    **dict.fromkeys(
        [
            aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default,
            aten.upsample_nearest2d.default, aten.upsample_bilinear2d.default,
            aten.upsample_bicubic2d.default, aten.upsample_nearest2d.vec,
            aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec,
            aten.reflection_pad2d.default, aten.replication_pad2d.default,
        ],
        _last(2),
    ),
    **dict.fromkeys(
        [aten.max_pool3d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool3d.default],
        _last(3),
    ),
    **dict.fromkeys(
        [
            aten.sym_size.int, operator.mul, operator.add, operator.sub, operator.floordiv,
            aten.cumsum.default, aten.view.default,
            aten.lstm.input, aten.gather.default, aten.index.Tensor, aten.repeat.default,
            aten.repeat_interleave.self_int, aten.einsum.default,
            aten.argsort.default, aten.topk.default, aten.max.dim, aten.baddbmm.default,
            aten.addmm.default, aten.addcmul.default,
            aten.pixel_shuffle.default,
            aten.pixel_unshuffle.default, aten.channel_shuffle.default, aten.conv_transpose2d.input,
            aten.adaptive_max_pool2d.default, aten.rms_norm.default, aten.grid_sampler.default,
            aten.new_zeros.default, aten.zeros_like.default, aten.select.int, aten.unbind.int,
            aten.split.Tensor, aten.chunk.default, aten.squeeze.dim, aten.unsqueeze.default,
        ],
        Rule(),
    ),
}  # fmt: skip

OPS: dict[str, Callable[..., Any]] = {
    op.__name__ if op.__class__.__module__ == "builtins" else str(op): op for op in RULES
}
NAMES = {op: name for name, op in OPS.items()}

UNKNOWN = Rule()
# Of graphs only: no step ever calls it.
INTERNAL: dict[Any, Rule] = {narrow_layer_norm: NarrowLayerNorm(), lstm_outputs: Lstm()}


def rule_of(facts: Analysis, node: fx.Node) -> Rule:
    """The rule of a node, or that of an unknown op if its special case is not understood."""
    rule = RULES.get(node.target) or INTERNAL.get(node.target, UNKNOWN)
    if node.target is aten.var.dim and not arg(node, 3, False):
        return UNKNOWN  # its result has fewer dimensions
    if isinstance(rule, Linear) and facts.live[arg(node, 0)].ndim < 2:
        return UNKNOWN
    if isinstance(rule, Conv) and any(isinstance(a, fx.Node) for a in node.args[3:]):
        return UNKNOWN  # the batch decides the number of groups
    if isinstance(rule, OneInput):
        moving = [n for n in inputs_of(facts, node) if facts.live[n].any()]
        return rule if moving in ([node.args[0]], []) else UNKNOWN
    inputs = [n for n in node.args if isinstance(n, fx.Node)]
    if isinstance(rule, (MatMul, Attention)):
        plain = len(set(inputs)) == len(inputs)
        plain = plain and min(facts.live[n].ndim for n in inputs) >= 2
        if isinstance(rule, Attention):
            heads = {tuple(facts.live[n].shape[:-2]) for n in inputs[:3]}
            plain = plain and len(heads) == 1 and not node.kwargs.get("enable_gqa")
        return rule if plain else UNKNOWN
    return rule
