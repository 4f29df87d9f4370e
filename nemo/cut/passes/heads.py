"""Phase 3b: order the channels of each attention head, live ones first (ours).

Every head may keep other channels, but a tensor (heads, channels) is a rectangle. A permutation of
the channels within a head, the same for q and k, or for v and the columns of the projection that
reads it, changes nothing; with live channels first, the rectangle is as wide as the widest head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from nemo.cut.facts import Analysis
from nemo.cut.graph import arg, aten, run
from nemo.cut.passes.split import MOVES, Shapes, leaves_of, view_of
from nemo.cut.trace import Traced

SCALES = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}


class End(NamedTuple):
    """Where parameters meet the channels of heads: entry places[h, c] of a parameter's `dim`."""

    op: fx.Node
    dim: int  # 0: rows, and the bias; 1: columns
    places: Tensor  # (heads, channels)


def order_heads(facts: Analysis) -> bool:
    """Permute parameters in `facts.traced` where it pays; True if something changed."""
    traced = facts.traced
    shapes = {node: tuple(live.shape) for node, live in facts.live.items()}
    changed = False
    for node in traced.calls():
        if not facts.present(node):
            continue
        if node.target is aten.scaled_dot_product_attention.default:
            q, k, v = ((arg(node, i), -1) for i in range(3))
        elif node.target is aten.matmul.default and len(shapes[node]) >= 3:
            q, k, v = (arg(node, 0), -1), (arg(node, 1), -2), (arg(node, 1), -1)
        else:
            continue
        if len({shapes[side][:-2] for side, _ in (q, k, v)}) > 1:
            continue  # some operand is shared between heads
        inner = [_producer(traced, *side, shapes) for side in (q, k)]
        outer = [_producer(traced, *v, shapes), _reader(traced, node, shapes)]
        changed |= _order(traced, inner, _alive(facts, *q) | _alive(facts, *k))
        changed |= _order(traced, outer, _alive(facts, *v))
    return changed


def _alive(facts: Analysis, node: fx.Node, axis: int) -> Tensor:
    """(heads, channels) that are computed for some token; leading dimensions are heads."""
    other = -2 if axis == -1 else -1
    return facts.elements(node).any(other).flatten(0, -2)


def _order(traced: Traced, ends: list[End | None], alive: Tensor) -> bool:
    """Permute both ends, if they are known and the rectangle gets narrower."""
    shapes = {end.places.shape for end in ends if end is not None}
    if None in ends or shapes != {alive.shape}:
        return False
    if int(alive.any(0).sum()) == int(alive.sum(1).max()):
        return False
    order = torch.argsort(~alive, dim=1, stable=True)
    for end in ends:
        assert end is not None
        for parameter in end.op.args[1:3] if end.dim == 0 else end.op.args[1:2]:
            if parameter is not None:
                _permute(traced, parameter, end.places, order, end.dim)
    return True


def _permute(traced: Traced, parameter: Any, places: Tensor, order: Tensor, dim: int) -> None:
    """Entry places[h, c] becomes the old entry places[h, order[h, c]]."""
    old = traced.constants[parameter]
    index = torch.arange(old.shape[dim])
    index[places.flatten()] = places.gather(1, order).flatten()
    traced.constants[parameter] = old.index_select(dim, index)


def _is_scale(traced: Traced, node: fx.Node) -> bool:
    """Whether an op multiplies by a number, or by a constant number per head."""
    if node.target is aten.dropout.default:
        return True
    factor = arg(node, 1)
    if node.target not in SCALES or not isinstance(factor, fx.Node):
        return node.target in SCALES
    return factor in traced.constants and all(n == 1 for n in factor.meta["dims"][-2:])


def _producer(traced: Traced, node: fx.Node, axis: int, shapes: Shapes) -> End | None:
    """The Linear or Conv that makes a (..., heads, tokens, channels) tensor and nothing else.

    Args:
        axis: of the channels, -1 or -2; the other of the two are tokens.
    """
    while len(node.users) == 1 and _is_scale(traced, node):
        node = arg(node, 0)
    view = view_of(node, shapes)
    if view is None or len(node.users) > 1 or leaves_of(view.source) != [node]:
        return None
    if not all(traced.owned(p) for p in view.source.args[1:3]):
        return None
    rows = view.rows() if axis == -1 else view.rows().transpose(-1, -2)
    if rows.ndim < 3 or not bool((rows == rows[..., :1, :]).all()):
        return None
    return End(view.source, 0, rows[..., 0, :].flatten(0, -2))


def _reader(traced: Traced, node: fx.Node, shapes: Shapes) -> End | None:
    """The Linear or convolution that alone reads an attention, by its columns."""
    *heads, _, channels = shapes[node]
    count = torch.Size(heads).numel() * channels
    labels = torch.arange(count).view(*heads, 1, channels).expand(shapes[node])
    while len(node.users) == 1:
        (user,) = node.users
        if arg(user, 0) is not node:
            return None
        if user.target in (aten.linear.default, aten.conv2d.default):
            if user.target is aten.conv2d.default:
                if arg(user, 6, 1) != 1:
                    return None
                labels = labels.movedim(1, -1)
            flat = labels.flatten(0, -2)
            whole = flat.shape[1] == count and bool((flat == flat[:1]).all())
            if not whole or not traced.owned(arg(user, 1)):
                return None
            return End(user, 1, torch.argsort(flat[0]).view(-1, channels))
        if user.target in MOVES:
            labels = run(user, labels, *user.args[1:])
        elif not _is_scale(traced, user):
            return None
        node = user
    return None
