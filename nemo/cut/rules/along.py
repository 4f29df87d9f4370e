"""The rules of ops that mix elements along some dimensions (ours)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from nemo.cut.facts import Analysis, Kept
from nemo.cut.graph import arg, aten
from nemo.cut.rules.base import OneInput, Shape, full, rule
from nemo.module.ops import OVER_AXES, OVER_LINES, OVER_MAPS, OVER_VOLUMES

Dimensions = Callable[[fx.Node, int], list[int]]


def _last(count: int) -> Dimensions:
    return lambda node, rank: list(range(rank - count, rank))


def _axes(position: int) -> Dimensions:
    """The dimension, or the dimensions, in one argument; all of them if it is empty."""

    def mixed(node: fx.Node, rank: int) -> list[int]:
        axes = arg(node, position)
        axes = [axes] if isinstance(axes, int) else axes
        return list(axes) if axes else list(range(rank))

    return mixed


def _padded(node: fx.Node, rank: int) -> list[int]:
    """The dimensions that are padded: sizes come in pairs, from the last dimension backwards."""
    sizes: Any = node.args[1]
    pairs = [sizes[i : i + 2] for i in range(0, len(sizes), 2)]
    return [rank - 1 - i for i, pair in enumerate(pairs) if any(pair)]


@rule(*OVER_AXES, mixed=_axes(1))
@rule(aten.var.dim, mixed=_axes(1))
@rule(aten.roll.default, mixed=_axes(2))
@rule(aten.constant_pad_nd.default, aten.pad.default, mixed=_padded)
@rule(*OVER_LINES, mixed=_last(1))
@rule(*OVER_MAPS, mixed=_last(2))
@rule(*OVER_VOLUMES, mixed=_last(3))
class Along(OneInput):
    """Mixes its input along some dimensions, and treats all others alike.

    Args:
        mixed: from the node and the input's rank to those dimensions.
    """

    def __init__(self, mixed: Dimensions) -> None:
        self.mixed = mixed

    def dims(self, node: fx.Node, rank: int) -> list[int]:
        return [d % rank for d in self.mixed(node, rank)]

    def applies(self, facts: Analysis, node: fx.Node) -> bool:
        ranks = {facts.value[n].ndim for n in (node, arg(node, 0))}  # else it drops dimensions
        return len(ranks) == 1 and super().applies(facts, node)

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = args[0]
        return x.sum(self.dims(node, x.ndim), keepdim=True).expand(shape)

    def close(self, facts: Analysis, node: fx.Node, kept: Kept) -> None:
        for d in self.dims(node, len(kept)):
            kept[d][:] = True

    def want(self, facts: Analysis, node: fx.Node, kept: Kept) -> Kept:
        everything = full(facts, arg(node, 0))
        mixed = self.dims(node, len(kept))
        return [w if d in mixed else kept[d].clone() for d, w in enumerate(everything)]


@rule(aten.sum.dim_IntList, mixed=_axes(1))
@rule(aten.linalg_vector_norm.default, mixed=_axes(2))
class Total(Along):
    """A sum or a norm: constant zeros can be left out."""

    def want(self, facts: Analysis, node: fx.Node, kept: Kept) -> Kept:
        source, want = arg(node, 0), super().want(facts, node, kept)
        nonzero = facts.nonzero(source)
        for d in self.dims(node, len(want)):
            if source.meta["dims"][d] is not None:
                want[d] = nonzero.any(dim=[a for a in range(nonzero.ndim) if a != d])
        return want
