"""Phase 2b: fused projections become one Linear per reader (ours).

qkv = Linear(x), then reshape, permute and slices: a mask of q differs from that of v, and a reshape
can only keep a rectangle. Whatever the rearrangements are called, q, k and v are strided views of
the projection's output: the strides, read off a tensor of positions, say which rows each of them
uses and how to rearrange them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from nemo.cut.graph import Rewriter, arg, aten, run
from nemo.cut.trace import Traced, evaluate, module_path

Shapes = dict[fx.Node, tuple[int, ...]]  # of every tensor at batch 1
MOVES = {aten.reshape.default, aten.permute.default, aten.slice.Tensor}
SOURCES: dict[Any, int] = {
    aten.linear.default: -1,
    aten.conv2d.default: 1,
}  # and the dimension of their channels


@dataclass
class View:
    """A value that is a strided view of the output of a Linear or Conv, at batch 1."""

    node: fx.Node
    source: fx.Node
    positions: Tensor  # of each element, in the flat output of the source
    shape: tuple[int, ...]  # of the source's output

    @property
    def axis(self) -> int:
        return SOURCES[self.source.target] % len(self.shape)

    @property
    def inner(self) -> int:
        return math.prod(self.shape[self.axis + 1 :])

    def rows(self) -> Tensor:
        """The output channel of each element."""
        return self.positions // self.inner % self.shape[self.axis]


def view_of(node: fx.Node, shapes: Shapes) -> View | None:
    """Follow rearrangements back to a Linear or Conv; None if something else is met."""
    chain = []
    source = node
    while source.target in MOVES:
        chain.append(source)
        source = arg(source, 0)
    if source.target not in SOURCES:
        return None
    shape = shapes[source]
    value = torch.arange(math.prod(shape)).view(shape)
    for move in reversed(chain):
        value = run(move, value, *move.args[1:])
    return View(node, source, value, shape)


def split_projections(
    traced: Traced, inputs: Sequence[Tensor], names: Mapping[tuple[str, int], str]
) -> None:
    """Give every reader that uses its own rows of a projection its own projection, in place.

    Args:
        inputs: one sample.
        names: what to call the part of a module that starts at some row.
    """
    values = evaluate(traced, inputs)
    shapes = {n: tuple(value.shape) for n, value in values.items() if isinstance(value, Tensor)}
    for source in traced.calls():
        if source.target not in SOURCES or source.args[1] not in traced.constants:
            continue
        if source.target is aten.conv2d.default and (len(source.args) > 6 and source.args[6] != 1):
            continue
        views = _parts(source, shapes)
        layouts = [_layout(view) for view in views]
        if len(views) > 1 and all(layout is not None for layout in layouts):
            for part, (view, layout) in enumerate(zip(views, layouts, strict=True)):
                assert layout is not None
                path = module_path(source)
                name = names.get((path, layout.rows[0]), f"{path}_{part}")
                _split(traced, view, layout, name, shapes)
    traced.graph.eliminate_dead_code()
    traced.drop_unused()


def leaves_of(source: fx.Node) -> list[fx.Node]:
    """The rearrangements of `source` that something else reads; itself if it is read directly."""
    leaves, queue = [], [source]
    while queue:
        node = queue.pop(0)
        moves = [user for user in node.users if user.target in MOVES]
        if len(moves) < len(node.users):
            leaves.append(node)
        queue += moves
    return leaves


def _parts(source: fx.Node, shapes: Shapes) -> list[View]:
    """The rearrangements of `source` that use rows of their own, as far down as there are such."""
    parts: list[tuple[View, set[int]]] = []
    for leaf in leaves_of(source):
        new = _used(leaf, shapes)
        while shared := [part for part in parts if part[1] & new[1]]:
            parts = [part for part in parts if not part[1] & new[1]]
            for view, _ in shared:
                new = _used(_common(new[0].node, view.node), shapes)
        parts.append(new)
    return [view for view, _ in parts]


def _used(node: fx.Node, shapes: Shapes) -> tuple[View, set[int]]:
    view = view_of(node, shapes)
    assert view is not None
    return view, set(view.rows().unique().tolist())


def _common(one: fx.Node, other: fx.Node) -> fx.Node:
    """The last value that both rearrangements of the same source come from."""
    above = {one}
    while one.target in MOVES:
        one = arg(one, 0)
        above.add(one)
    while other not in above:
        other = arg(other, 0)
    return other


@dataclass
class _Layout:
    """How a view lies in its source: its rows in order, and its dimensions by falling stride."""

    rows: list[int]
    order: list[int]  # dimensions of the view, outermost in the source first
    channels: list[int]  # those of them that run over rows


def _layout(view: View) -> _Layout | None:
    """Strides of the view; None if it is not strided, or leaves out more than rows."""
    shape = tuple(view.positions.shape)
    strides = [_stride(view.positions, d) for d in range(len(shape))]
    first = int(view.positions.flatten()[0])
    expected = torch.full(shape, first)
    for d, stride in enumerate(strides):
        expected = expected + torch.arange(shape[d]).view(-1, *[1] * (len(shape) - 1 - d)) * stride
    if not torch.equal(expected, view.positions):
        return None
    inner, width = view.inner, view.shape[view.axis]
    channels = [d for d in range(len(shape)) if inner <= strides[d] < inner * width]
    others = math.prod(shape[d] for d in range(len(shape)) if d not in channels)
    if others * width != math.prod(view.shape):
        return None
    target = view.node.meta["dims"]
    if view.source.meta["dims"][0] is not None or target.count(None) != 1:
        return None
    batch = target.index(None)
    if shape[batch] == 1:
        strides[batch] = math.prod(view.shape)  # the batch is outermost
    elif strides[batch] != max(strides) or strides[batch] < view.inner * view.shape[view.axis]:
        return None  # the batch is merged with heads
    order = sorted(range(len(shape)), key=lambda d: -strides[d])
    channels = [d for d in order if d in channels]
    rows = torch.tensor([first // inner % width])
    for d in channels:
        rows = (rows[:, None] + torch.arange(shape[d]) * (strides[d] // inner)).flatten()
    return _Layout(rows.tolist(), order, channels)


def _stride(positions: Tensor, dim: int) -> int:
    if positions.shape[dim] == 1:
        return 0
    ahead = positions.narrow(dim, 1, 1) - positions.narrow(dim, 0, 1)
    return int(ahead.flatten()[0])


def _split(traced: Traced, view: View, layout: _Layout, name: str, shapes: Shapes) -> None:
    """Replace a view by reshape and permute of a new projection with the view's rows only."""
    source, node, axis = view.source, view.node, view.axis
    args = list(source.args)
    for position, kind in ((1, "weight"), (2, "bias")):
        if len(args) > position and args[position] is not None:
            old: Any = args[position]
            value = traced.constants[old][layout.rows]
            args[position] = traced.constant(f"{old.name}_part", value, f"{name}.{kind}")
    rewriter = Rewriter(traced.graph, node)
    dims = list(source.meta["dims"])
    dims[axis] = len(layout.rows)
    new = rewriter.call(source.target, tuple(args), tuple(dims))
    new.kwargs = dict(source.kwargs)
    new.meta["path"] = name
    shapes[new] = tuple(len(layout.rows) if d == axis else s for d, s in enumerate(view.shape))
    target = node.meta["dims"]
    reshaped = rewriter.reshape(new, tuple(target[d] for d in layout.order))
    back = [layout.order.index(d) for d in range(len(target))]
    result = reshaped if back == sorted(back) else rewriter.permute(reshaped, back)
    shapes[reshaped] = tuple(view.positions.shape[d] for d in layout.order)
    shapes[result] = tuple(view.positions.shape)
    node.replace_all_uses_with(result)
