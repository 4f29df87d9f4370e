"""The rules of Linear and convolutions: where channels are really removed (ours).

Letters: B batch, I/O input and output channels, G groups.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from nemo.cut.builder import Builder
from nemo.cut.facts import Analysis, Kept
from nemo.cut.graph import arg, aten
from nemo.cut.rules.base import OneInput, Shape, full, rule
from nemo.module.layers import Config
from nemo.module.program import Ref


def parameters(facts: Analysis, node: fx.Node, **positions: int) -> dict[str, Tensor]:
    """The constant tensors among a layer's arguments, by name; those that are None are left out."""
    held = {name: arg(node, position) for name, position in positions.items()}
    return {name: facts.value[n] for name, n in held.items() if n is not None}


@rule(aten.linear.default)
class Linear(OneInput):
    """x (..., I), weight (O, I): constant columns that say the same everywhere go to the bias."""

    def applies(self, facts: Analysis, node: fx.Node) -> bool:
        return facts.live[arg(node, 0)].ndim >= 2 and super().applies(facts, node)

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        return torch.nn.functional.linear(args[0], args[1])

    def _columns(self, facts: Analysis, node: fx.Node, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Columns to keep, bool (I,), and the constants that stand in the others, (I,)."""
        source = arg(node, 0)
        used = (facts.value[arg(node, 1)][rows] != 0).any(0)
        columns = facts.elements(source).flatten(0, -2).any(0) & used
        live, value = facts.live[source].flatten(0, -2), facts.value[source].flatten(0, -2)
        low = value.masked_fill(live, float("inf")).amin(0)
        high = value.masked_fill(live, float("-inf")).amax(0)
        aside = used & ~columns & ~live.all(0) & ((low != 0) | (high != 0))
        columns = columns | (aside & (low != high))
        return columns, torch.where(aside & ~columns, low, 0.0)

    def want(self, facts: Analysis, node: fx.Node, kept: Kept) -> Kept:
        columns, _ = self._columns(facts, node, kept[-1])
        return [*(vector.clone() for vector in kept[:-1]), columns]

    def write(self, build: Builder, node: fx.Node, kept: Kept, x: Ref) -> Ref:
        rows = kept[-1]
        columns, constants = self._columns(build.facts, node, rows)
        held = parameters(build.facts, node, weight=1, bias=2)
        weight = held["weight"][rows]
        tensors = {"weight": weight[:, columns].contiguous()}
        shift = weight @ constants
        if "bias" in held or shift.any():
            tensors["bias"] = held["bias"][rows] + shift if "bias" in held else shift
        build.rows(node, rows)
        return build.layer(node, "Linear", {}, tensors, x)


@rule(aten.conv1d.default, aten.conv1d.padding, rank=1)
@rule(aten.conv2d.default, aten.conv2d.padding, rank=2)
@rule(aten.conv3d.default, aten.conv3d.padding, rank=3)
class Conv(OneInput):
    """x (B, I, ...), weight (O, I/G, ...); dead groups go, the others stay equally wide."""

    kind = "Conv"
    places: ClassVar = {"stride": 3, "padding": 4, "dilation": 5}  # of its settings

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def applies(self, facts: Analysis, node: fx.Node) -> bool:
        sized = any(isinstance(a, fx.Node) for a in node.args[3:])  # groups that the batch decides
        return not sized and super().applies(facts, node)

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        return self._run(node, args[0], args[1])

    def _run(self, node: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution without its bias."""
        assert callable(node.target)
        result: Tensor = node.target(x, weight, None, *node.args[3:], **node.kwargs)
        return result

    def _groups(self, node: fx.Node) -> int:
        return int(arg(node, 6, 1))

    def _rows(self, weight: Tensor, groups: int) -> Tensor:
        """A weight as (O, I/G, ...), and back."""
        return weight

    def close(self, facts: Analysis, node: fx.Node, kept: Kept) -> None:
        for vector in kept[2:]:
            vector[:] = True
        kept[1] = _level(kept[1], kept[1], self._groups(node))

    def _channels(self, facts: Analysis, node: fx.Node, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Input channels to keep, bool (I,), and what the others add to each output, (O,)."""
        source, groups = arg(node, 0), self._groups(node)
        kernel: Tensor = facts.value[arg(node, 1)]
        weight = self._rows(kernel, groups)
        nonzero = (weight.flatten(2) != 0).any(2).view(groups, -1, weight.shape[1])
        used = (nonzero & rows.view(groups, -1, 1)).any(1).flatten()
        other = [0, *range(2, self.rank + 2)]
        channels = facts.elements(source).any(dim=other) & used
        constant = facts.constant(source)
        aside = used & ~channels & (constant != 0).any(dim=other)
        shift = torch.zeros(len(rows), dtype=weight.dtype)
        if aside.any():
            added = self._run(node, constant * aside.view(-1, *[1] * self.rank), kernel)
            added = added.transpose(0, 1).flatten(1)
            if (added == added[:, :1])[rows].all():
                shift = added[:, 0]
            else:  # not the same everywhere, for the padding is zero
                channels = channels | aside
        alive = rows.view(groups, -1).any(1).repeat_interleave(weight.shape[1])
        level = _level(channels, alive, groups)
        if shift.any() and (level & aside).any():  # never add a constant twice
            return alive, torch.zeros_like(shift)
        return level, shift

    def want(self, facts: Analysis, node: fx.Node, kept: Kept) -> Kept:
        channels, _ = self._channels(facts, node, kept[1])
        return [kept[0].clone(), channels, *full(facts, arg(node, 0))[2:]]

    def write(self, build: Builder, node: fx.Node, kept: Kept, x: Ref) -> Ref:
        rows, groups = kept[1], self._groups(node)
        channels, shift = self._channels(build.facts, node, rows)
        held = parameters(build.facts, node, weight=1, bias=2)
        columns = channels.view(groups, -1)
        whole = self._rows(held["weight"], groups)
        blocks = zip(whole.chunk(groups), rows.view(groups, -1), columns, strict=True)
        weight = torch.cat([block[here][:, cols] for block, here, cols in blocks if here.any()])
        left = int(columns.any(1).sum())
        tensors = {"weight": self._rows(weight, left).contiguous()}
        if "bias" in held or shift.any():
            tensors["bias"] = (held["bias"] + shift if "bias" in held else shift)[rows]
        build.rows(node, rows)
        return build.layer(node, *self._kind(node, left), tensors, x)

    def _kind(self, node: fx.Node, groups: int) -> tuple[str, Config]:
        """The layer, and its settings."""
        config = {
            name: _sizes(arg(node, i, [int(name in ("stride", "dilation"))]), self.rank)
            for name, i in self.places.items()
        }
        return f"{self.kind}{self.rank}d", {**config, "groups": groups}


@rule(aten.conv_transpose1d.default, rank=1)
@rule(aten.conv_transpose2d.input, rank=2)
@rule(aten.conv_transpose3d.input, rank=3)
class ConvTranspose(Conv):
    """x (B, I, ...), weight (I, O/G, ...)."""

    kind = "ConvTranspose"
    places: ClassVar = {"stride": 3, "padding": 4, "output_padding": 5, "dilation": 7}

    def _rows(self, weight: Tensor, groups: int) -> Tensor:
        blocks = weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2)
        return blocks.flatten(0, 1)


def _sizes(value: Any, rank: int) -> Any:
    """One number for each spatial dimension, or a word such as "same"."""
    if isinstance(value, str):
        return value
    sizes = [int(v) for v in value]
    return sizes * rank if len(sizes) == 1 else sizes


def _level(kept: Tensor, alive: Tensor, groups: int) -> Tensor:
    """Grow `kept` so that every group with an entry in `alive` keeps the same number (>= 1)."""
    table = kept.view(groups, -1).clone()
    live = alive.view(groups, -1).any(1)
    table[~live] = False
    most = max(1, int(table.sum(1).max()))
    for group in live.nonzero().flatten().tolist():
        free = (~table[group]).nonzero().flatten()
        table[group, free[: most - int(table[group].sum())]] = True
    return table.flatten()
