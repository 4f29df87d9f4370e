"""How ops that only move elements are said in normal form: reshape, permute, slice, cat, expand."""

from __future__ import annotations

import torch
from torch import fx

from nemo.cut.graph import Dims, Rewriter, arg, aten, dims, run

LAST = 2**63 - 1  # how "to the end" is traced


def axis(node: fx.Node, position: int, rank: int, default: int = 0) -> int:
    """An argument that names a dimension, as a number from 0."""
    return int(arg(node, position, node.kwargs.get("dim", default))) % rank


def reshaped(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """view, flatten, unflatten, squeeze, ...: whatever the words, the shape of the result."""
    return None if dims(node).count(None) > 1 else rewriter.reshape(arg(node, 0), dims(node))


def permuted(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """transpose, movedim, ...: whatever the words, what becomes of dimensions of unequal sizes."""
    source = arg(node, 0)
    probe = torch.empty(*range(2, 2 + len(dims(source))), device="meta")
    order = [size - 2 for size in run(node, probe, *node.args[1:], **node.kwargs).shape]
    return rewriter.permute(source, order)


def selected(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    source, index = arg(node, 0), arg(node, 2)
    if not isinstance(index, int):
        return None
    return pick(rewriter, source, axis(node, 1, len(dims(source))), index, dims(node))


def pick(rewriter: Rewriter, source: fx.Node, dim: int, index: int, shape: Dims) -> fx.Node | None:
    size = dims(source)[dim]
    if size is None or shape.count(None) > 1:
        return None
    start = index % size
    return rewriter.reshape(rewriter.slice(source, dim, start, start + 1), shape)


def sliced(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    source: fx.Node = arg(node, 0)
    start, stop, step = arg(node, 2), arg(node, 3), arg(node, 4, 1)
    dim = axis(node, 1, len(dims(source)))
    size = dims(source)[dim]
    if size is None:  # only x[:] is understood along the batch
        return source if start in (0, None) and stop in (LAST, None) and step == 1 else None
    if not all(v is None or isinstance(v, int) for v in (start, stop, step)):
        return None
    first, last, stride = slice(start, stop, step).indices(size)
    if (first, last, stride) == (0, size, 1):
        return source
    return rewriter.slice(source, dim, first, last, stride)


def narrowed(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    source, start, length = arg(node, 0), arg(node, 2), arg(node, 3)
    dim = axis(node, 1, len(dims(source)))
    size = dims(source)[dim]
    if size is None or not isinstance(start, int) or not isinstance(length, int):
        return None
    start += size if start < 0 else 0
    return rewriter.slice(source, dim, start, start + length)


def split(rewriter: Rewriter, node: fx.Node) -> list[fx.Node] | None:
    """split, chunk, tensor_split: the pieces, as slices of the sizes that were traced."""
    source = arg(node, 0)
    dim = axis(node, 2, len(dims(source)))
    if dims(source)[dim] is None:
        return None
    pieces, start = [], 0
    for piece in node.meta["val"]:
        stop = start + int(piece.shape[dim])
        pieces.append(rewriter.slice(source, dim, start, stop))
        start = stop
    return pieces


def unbound(rewriter: Rewriter, node: fx.Node) -> list[fx.Node] | None:
    source = arg(node, 0)
    dim = axis(node, 1, len(dims(source)))
    size, shape = dims(source)[dim], dims(source)[:dim] + dims(source)[dim + 1 :]
    if size is None or shape.count(None) > 1:
        return None
    pieces = [rewriter.slice(source, dim, index, index + 1) for index in range(size)]
    return [rewriter.reshape(piece, shape) for piece in pieces]


def stacked(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    dim = axis(node, 1, len(dims(node)))
    shape = (*dims(node)[:dim], 1, *dims(node)[dim + 1 :])
    if shape.count(None) > 1:
        return None
    return rewriter.cat([rewriter.reshape(source, shape) for source in arg(node, 0)], dim)


def concatenated(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    sources = [source for source in arg(node, 0) if dims(source) != (0,)]
    return rewriter.cat(sources, axis(node, 1, len(dims(node))))


def expanded(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """expand, expand_as; sizes that come from the batch can only stay as they are."""
    return expand(rewriter, arg(node, 0), dims(node))


def expand(rewriter: Rewriter, source: fx.Node, shape: Dims) -> fx.Node | None:
    """A value in another shape, or None where the batch's size would be needed for it."""
    if dims(source) == shape:
        return source
    padded = (1,) * (len(shape) - len(dims(source))) + dims(source)
    if any(new is None and old is not None for old, new in zip(padded, shape, strict=True)):
        return None
    sizes = [-1 if size is None else size for size in shape]
    return rewriter.call(aten.expand.default, (source, sizes), shape)
