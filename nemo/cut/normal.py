"""How each ATen op is said in normal form."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from nemo.cut.graph import Dims, Rewriter, arg, as_weights, aten, dims, dims_of, lstm_outputs
from nemo.cut.rearrange import (
    concatenated,
    expand,
    expanded,
    narrowed,
    permuted,
    reshaped,
    selected,
    sliced,
    split,
    stacked,
    unbound,
)

# Ops without effect on a functional graph in eval mode.
IDENTITIES = {
    aten.clone.default, aten.detach.default, aten.alias.default, aten.contiguous.default,
    aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.detach_.default,
}  # fmt: skip
CASTS = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default,
    aten.type_as.default,
}  # fmt: skip
CHECKS = {
    aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
}  # fmt: skip


Normaliser = Callable[[Rewriter, fx.Node], "fx.Node | list[fx.Node] | None"]


def _reduced(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """mean, sum, amax over some dimensions: keep them at size 1, then drop them by a reshape."""
    source, axes = arg(node, 0), arg(node, 1)
    rank = len(dims(source))
    axes = [axes] if isinstance(axes, int) else axes
    axes = sorted(a % rank for a in axes or range(rank))
    if dims(node).count(None) > 1 or any(dims(source)[a] is None for a in axes):
        return None
    kept = tuple(1 if i in axes else size for i, size in enumerate(dims(source)))
    reduced = rewriter.call(node.target, (source, axes, True, *node.args[3:]), kept)
    reduced.kwargs = {key: value for key, value in node.kwargs.items() if key != "keepdim"}
    return rewriter.reshape(reduced, dims(node))


def _dropped(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """Dropout stays, for train(); a rate of 0 does not."""
    return arg(node, 0) if arg(node, 1) == 0 else None


def _cast(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """A cast to the type the value has already is nothing."""
    before, after = arg(node, 0).meta.get("val"), node.meta["val"]
    if before is not None and (before.dtype, before.device) == (after.dtype, after.device):
        return arg(node, 0)  # type: ignore[no-any-return]
    if node.target is not aten.to.dtype:
        return rewriter.call(aten.to.dtype, (arg(node, 0), after.dtype), dims(node))
    return None


def _cast_back(graph: fx.Graph, inputs: Sequence[fx.Node]) -> None:
    """To the type of the weights, float64 here, which is another one where the module runs."""
    floats = [n for n in inputs if n.meta["val"].is_floating_point()]
    op = aten.type_as.default if floats else as_weights
    for node in list(graph.nodes):
        if node.target in CASTS and node.meta["val"].dtype == torch.float64:
            new = Rewriter(graph, node).call(op, (arg(node, 0), *floats[:1]), dims(node))
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        elif node.kwargs.get("dtype") == torch.float64 and node.all_input_nodes:  # zeros_like, ...
            new = Rewriter(graph, node.next).call(op, (node, *floats[:1]), dims(node))
            node.replace_all_uses_with(new, lambda user, new=new: user is not new)


def _copied(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """copy, which has no derivative, as what is copied, in the shape and type that it gets."""
    base, source, after = arg(node, 0), arg(node, 1), node.meta["val"]
    if source.meta["val"].dtype != after.dtype:
        kept = source.meta["val"].to(after.dtype)
        source = rewriter.call(aten.to.dtype, (source, after.dtype), dims(source))
        source.meta["val"] = kept
    copied = expand(rewriter, source, dims(node))
    if copied is None:  # over the batch
        zeros = rewriter.call(aten.zeros_like.default, (base,), dims(base))
        copied = rewriter.call(aten.add.Tensor, (zeros, source), dims(node))
    return copied


def _multiplied(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    return rewriter.call(aten.matmul.default, (arg(node, 0), arg(node, 1)), dims(node))


def _gated(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """prelu with a weight for each channel, in dimension 1, as relu(x) - weight * relu(-x)."""
    x, weight = arg(node, 0), arg(node, 1)
    if dims(weight) == (1,) or len(dims(x)) <= 2:
        return None
    shape = dims(x)
    column = rewriter.reshape(weight, (*dims(weight), *[1] * (len(shape) - 2)))
    negative = rewriter.call(aten.neg.default, (x,), shape)
    negative = rewriter.call(aten.relu.default, (negative,), shape)
    scaled = rewriter.call(aten.mul.Tensor, (negative, column), shape)
    positive = rewriter.call(aten.relu.default, (x,), shape)
    return rewriter.call(aten.sub.Tensor, (positive, scaled), shape)


def _affine(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """addmm, as a Linear."""
    bias, x, weight = (arg(node, i) for i in range(3))
    if len(dims(bias)) != 1 or any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
        return None
    rows = rewriter.permute(weight, [1, 0])
    return rewriter.call(aten.linear.default, (x, rows, bias), dims(node))


def _counted(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """arange(batch), as a sum of ones that live where the inputs do."""
    alone = node.target is aten.arange.default
    first, end = (0, node.args[0]) if alone else node.args[:2]
    if getattr(end, "target", None) is not aten.sym_size.int or first or arg(node, 2, 1) != 1:
        return None
    assert isinstance(end, fx.Node)
    zeros = rewriter.call(aten.new_zeros.default, (arg(end, 0), [end]), (None,))
    zeros.kwargs = {"dtype": node.meta["val"].dtype}
    ones = rewriter.call(aten.add.Scalar, (zeros, 1), (None,))
    counted = rewriter.call(aten.cumsum.default, (ones, 0), (None,))
    return rewriter.call(aten.sub.Scalar, (counted, 1), (None,))


def _added(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """addcmul, as a product and a sum."""
    base, left, right = (arg(node, i) for i in range(3))
    if node.kwargs.get("value", 1) != 1:
        return None
    product = rewriter.call(aten.mul.Tensor, (left, right), _broadcast(dims(left), dims(right)))
    return rewriter.call(aten.add.Tensor, (base, product), dims(node))


def _broadcast(one: Dims, other: Dims) -> Dims:
    rank = max(len(one), len(other))
    pairs = zip((1,) * (rank - len(one)) + one, (1,) * (rank - len(other)) + other, strict=True)
    return tuple(b if a == 1 else a for a, b in pairs)


def _filled(value: float, rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """new_zeros, ones_like, ...: of another tensor only the type is read; this is a constant."""
    if None in dims(node):
        return None
    new = rewriter.call(aten.full.default, (list(dims(node)), value), dims(node))
    like = node.meta["val"]
    new.kwargs = {"dtype": like.dtype, "device": like.device}
    return new


def _emptied(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """empty_like, new_empty: 0 until it is written, and not what the memory holds."""
    zeros = aten.zeros_like if node.target is aten.empty_like.default else aten.new_zeros
    new = _filled(0, rewriter, node) or rewriter.call(zeros.default, node.args, dims(node))
    new.kwargs = new.kwargs or node.kwargs
    return new


def _bagged(rewriter: Rewriter, node: fx.Node) -> list[fx.Node] | None:
    """Bags of one size, as the sum, mean or maximum of their embeddings."""
    weight, ids, offsets, _, mode, _, scales, whole, padding = (arg(node, i) for i in range(9))
    if (ids.target, offsets.target) != (aten.reshape.default, aten.arange.start_step):
        return None
    bags = arg(ids, 0)
    regular = arg(offsets, 0) == 0 and dims(bags)[1:] == (arg(offsets, 2),)
    padded = padding not in (None, -1)
    if not regular or whole or (padded and mode == 2):
        return None
    column, shape = (*dims(bags), 1), (*dims(bags), dims(weight)[1])
    short = (shape[0], 1, shape[2])
    rows = rewriter.call(aten.embedding.default, (weight, bags), shape)
    if scales is not None:
        rows = rewriter.call(aten.mul.Tensor, (rows, rewriter.reshape(scales, column)), shape)
    if not padded:
        reduce = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default)[mode]
        reduced = rewriter.call(reduce, (rows, [1], True), short)
        return [rewriter.reshape(reduced, (shape[0], shape[2]))] * 4
    counts = rewriter.call(aten.ne.Scalar, (bags, padding), dims(bags))
    counts = rewriter.call(aten.type_as.default, (rewriter.reshape(counts, column), rows), column)
    counts.meta["val"] = node.meta["val"][0]
    rows = rewriter.call(aten.mul.Tensor, (rows, counts), shape)
    reduced = rewriter.call(aten.sum.dim_IntList, (rows, [1], True), short)
    if mode == 1:
        many = rewriter.call(aten.sum.dim_IntList, (counts, [1], True), (shape[0], 1, 1))
        many = rewriter.call(aten.clamp_min.default, (many, 1), (shape[0], 1, 1))
        reduced = rewriter.call(aten.div.Tensor, (reduced, many), short)
    return [rewriter.reshape(reduced, (shape[0], shape[2]))] * 4


def _lstm(rewriter: Rewriter, node: fx.Node) -> list[fx.Node] | None:
    """An LSTM of which only the outputs are read, not its last state."""
    if any(arg(user, 1) != 0 and user.users for user in node.users) or not isinstance(
        arg(node, 3), bool
    ):
        return None
    shape = dims_of(node.meta["val"][0])
    return None if shape is None else [rewriter.call(lstm_outputs, node.args, shape)] * 3


def _normed(rewriter: Rewriter, node: fx.Node) -> list[fx.Node]:
    """What torch.export's own functionalisation makes of a BatchNorm in eval mode."""
    x, weight, bias, mean, variance, momentum, eps = node.args
    args = (x, weight, bias, mean, variance, False, momentum, eps, False)
    return [rewriter.call(aten.batch_norm.default, args, dims(arg(node, 0)))] * 3


def _instance_normed(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """InstanceNorm without running statistics: a GroupNorm whose groups are single channels."""
    x, weight, bias, mean, _, of_inputs, _, eps, _ = node.args
    channels = dims(arg(node, 0))[1]
    if mean is not None or not of_inputs or channels is None:
        return None
    return rewriter.call(aten.group_norm.default, (x, channels, weight, bias, eps), dims(node))


NORMALISERS: dict[Any, Normaliser] = {
    **dict.fromkeys(
        [
            aten.view.default, aten.reshape.default, aten._unsafe_view.default,
            aten.flatten.using_ints, aten.unflatten.int, aten.view_as.default,
            aten.reshape_as.default, aten.unsqueeze.default, aten.squeeze.default,
            aten.squeeze.dim, aten.squeeze.dims,
        ],
        reshaped,
    ),
    **dict.fromkeys(
        [
            aten.permute.default, aten.transpose.int, aten.t.default, aten.swapaxes.default,
            aten.movedim.int, aten.movedim.intlist, aten.numpy_T.default, aten.mT.default,
        ],
        permuted,
    ),
    aten.select.int: selected,
    aten.slice.Tensor: sliced,
    aten.narrow.default: narrowed,
    **dict.fromkeys(
        [
            aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes,
            aten.tensor_split.sections, aten.tensor_split.indices,
        ],
        split,
    ),
    aten.unbind.int: unbound,
    aten.stack.default: stacked,
    aten.cat.default: concatenated,
    **dict.fromkeys(
        [aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default], _reduced
    ),
    **dict.fromkeys([aten.dropout.default, aten.feature_dropout.default], _dropped),
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(
        [aten.expand.default, aten.expand_as.default, aten.broadcast_to.default], expanded
    ),
    aten.copy.default: _copied,
    **dict.fromkeys([aten.bmm.default, aten.mm.default], _multiplied),
    aten._native_batch_norm_legit_no_training.default: _normed,
    aten.instance_norm.default: _instance_normed,
    aten.addcmul.default: _added,
    aten.addmm.default: _affine,
    aten.prelu.default: _gated,
    **dict.fromkeys(
        [aten.arange.default, aten.arange.start, aten.arange.start_step], _counted
    ),
    **dict.fromkeys([aten.new_zeros.default, aten.zeros_like.default], partial(_filled, 0)),
    **dict.fromkeys([aten.empty_like.default, aten.new_empty.default], _emptied),
    **dict.fromkeys([aten.new_ones.default, aten.ones_like.default], partial(_filled, 1)),
    aten.lstm.input: _lstm,
    aten.embedding_bag.padding_idx: _bagged,
    **dict.fromkeys(IDENTITIES, lambda rewriter, node: arg(node, 0)),
}  # fmt: skip


def normalise(graph: fx.Graph, inputs: Sequence[fx.Node]) -> None:
    """Bring every node to normal form, in place; `inputs` are the samples' placeholders."""
    entry = inputs[0]
    batch = entry.meta["val"].shape[0]
    for node in list(graph.nodes):
        if node.op == "output":
            continue
        node.meta["dims"] = dims_of(node.meta.get("val"))
        if node.target in CHECKS:
            graph.erase_node(node)
            continue
        if "device" in node.kwargs and node.all_input_nodes:  # that of the input, where it runs
            node.kwargs = {key: v for key, v in node.kwargs.items() if key != "device"}
        if node.target is aten.sym_size.int and node.meta["val"].node.expr == batch.node.expr:
            node.args = (entry, 0)
        normaliser = NORMALISERS.get(node.target)
        new = None if normaliser is None else normaliser(Rewriter(graph, node), node)
        if isinstance(new, list):
            for user in list(node.users):
                assert user.target is operator.getitem
                piece = new[arg(user, 1)]
                piece.meta.setdefault("val", user.meta["val"])
                user.replace_all_uses_with(piece)
                graph.erase_node(user)
            graph.erase_node(node)
        elif new is not None and new is not node:
            new.meta.setdefault("val", node.meta["val"])
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    _cast_back(graph, inputs)
    graph.eliminate_dead_code()
