"""The rules of ops that move elements: permute, slice, concatenate, reshape, ... (ours)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from nemo.cut.builder import Builder
from nemo.cut.facts import Analysis, Kept
from nemo.cut.graph import arg, aten, dims, run
from nemo.cut.rules.base import Demand, OneInput, Rule, Shape, aligned, copied, full, rule
from nemo.module.program import Ref


class Move(OneInput):
    """Base of ops that are their own stand-in."""

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = run(node, *args)
        return result


@rule(aten.permute.default)
class Permute(Move):
    """permute(x, order)."""

    grows = True

    def want(self, facts: Analysis, node: fx.Node, kept: Kept) -> Kept:
        of = dict(zip(arg(node, 1), kept, strict=True))
        return [of[d].clone() for d in range(len(kept))]


@rule(aten.expand.default)
class Expand(OneInput):
    """expand(x, sizes): dimensions of size 1, or new ones in front, repeat."""

    grows = True

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = args[0]
        return x.expand(shape)

    def want(self, facts: Analysis, node: fx.Node, kept: Kept) -> Kept:
        return aligned(kept, facts.live[arg(node, 0)].shape)

    def write(self, build: Builder, node: fx.Node, kept: Kept, x: Ref) -> Ref:
        source = tuple(build.facts.live[arg(node, 0)].shape)
        before = (0,) * (len(kept) - len(source)) + source
        sizes = [
            -1 if size == len(vector) else int(vector.sum())
            for size, vector in zip(before, kept, strict=True)
        ]
        return build.op(node, node.target, x, sizes)


@rule(aten.slice.Tensor)
class Slice(Move):
    """slice(x, dim, start, stop, step): what is kept of it is picked from the input."""

    grows = True

    def applies(self, facts: Analysis, node: fx.Node) -> bool:
        computed = any(isinstance(bound, fx.Node) for bound in node.args[2:])  # from the batch size
        return super().applies(facts, node) and not computed

    def want(self, facts: Analysis, node: fx.Node, kept: Kept) -> Kept:
        dim, start, stop, step = (arg(node, i) for i in range(1, 5))
        want = copied(kept)
        want[dim] = torch.zeros(facts.live[arg(node, 0)].shape[dim], dtype=torch.bool)
        want[dim][start:stop:step] = kept[dim]
        return want

    def write(self, build: Builder, node: fx.Node, kept: Kept, x: Ref) -> Ref:
        return x


@rule(aten.index_select.default)
class Gather(Move):
    """index_select(x, dim, index) with a constant index."""

    grows = True

    def want(self, facts: Analysis, node: fx.Node, kept: Kept) -> Kept:
        dim = arg(node, 1)
        want = copied(kept)
        want[dim] = torch.zeros(facts.live[arg(node, 0)].shape[dim], dtype=torch.bool)
        want[dim][facts.value[arg(node, 2)][kept[dim]]] = True
        return want

    def write(self, build: Builder, node: fx.Node, kept: Kept, x: Ref) -> Ref:
        dim = arg(node, 1) % len(kept)
        read = self.want(build.facts, node, kept)[dim]
        place = (read.cumsum(0) - 1)[build.facts.value[arg(node, 2)][kept[dim]]]
        if torch.equal(place, torch.arange(int(read.sum()))):
            return x
        return build.layer(node, "Select", {"dim": dim}, {"index": place}, x)


@rule(aten.unfold.default)
class Unfold(Move):
    """unfold(x, dim, size, step): windows along `dim`; the places in them are a new dimension."""

    def close(self, facts: Analysis, node: fx.Node, kept: Kept) -> None:
        for d in (arg(node, 1) % (len(kept) - 1), -1):
            kept[d][:] = True

    def want(self, facts: Analysis, node: fx.Node, kept: Kept) -> Kept:
        want, dim = copied(kept[:-1]), arg(node, 1) % (len(kept) - 1)
        want[dim] = full(facts, arg(node, 0))[dim]
        return want


@rule(aten.im2col.default)
class Patches(Move):
    """im2col: (B, C, ...) becomes (B, C K, L), the K places of the kernel within each channel."""

    def _size(self, node: fx.Node) -> int:
        return math.prod(arg(node, 1))

    def close(self, facts: Analysis, node: fx.Node, kept: Kept) -> None:
        channels = kept[1].view(-1, self._size(node)).any(1)
        kept[1:] = [channels.repeat_interleave(self._size(node)), torch.ones_like(kept[2])]

    def want(self, facts: Analysis, node: fx.Node, kept: Kept) -> Kept:
        channels = kept[1].view(-1, self._size(node)).any(1)
        return [kept[0].clone(), channels, *full(facts, arg(node, 0))[2:]]


@rule(aten.col2im.default)
class Overlay(Patches):
    """col2im, the transposed im2col: (B, C K, L) becomes (B, C, ...)."""

    def _size(self, node: fx.Node) -> int:
        return math.prod(arg(node, 2))

    def close(self, facts: Analysis, node: fx.Node, kept: Kept) -> None:
        for vector in kept[2:]:
            vector[:] = True

    def want(self, facts: Analysis, node: fx.Node, kept: Kept) -> Kept:
        rows = kept[1].repeat_interleave(self._size(node))
        return [kept[0].clone(), rows, full(facts, arg(node, 0))[2]]


@rule(aten.cat.default)
class Cat(Rule):
    """Concatenation. Its constant pieces, such as a class token, are carried along as if live."""

    blocks, wakes = False, True

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        return torch.cat(args[0], args[1])

    def close(self, facts: Analysis, node: fx.Node, kept: Kept) -> None:
        pass

    def _parts(self, facts: Analysis, node: fx.Node, kept: Kept) -> list[tuple[fx.Node, Kept]]:
        sources, dim = arg(node, 0), arg(node, 1)
        pieces = torch.split(kept[dim], [facts.live[n].shape[dim] for n in sources])
        return [
            (n, [piece if d == dim else vector for d, vector in enumerate(kept)])
            for n, piece in zip(sources, pieces, strict=True)
        ]

    def demand(self, facts: Analysis, node: fx.Node, kept: Kept) -> Demand:
        demand: Demand = {}
        for n, want in self._parts(facts, node, kept):
            old = demand.get(n, want)
            demand[n] = [a | b for a, b in zip(old, want, strict=True)]
        return demand

    def emit(self, build: Builder, node: fx.Node, kept: Kept) -> Ref:
        dim = arg(node, 1)
        parts = self._parts(build.facts, node, kept)
        values = [build.fetch(n, want) for n, want in parts if want[dim].any()]
        single: Ref = values[0]
        return single if len(values) == 1 else build.op(node, node.target, values, dim)


@rule(aten.reshape.default)
class Reshape(OneInput):
    """Splits and merges dimensions; kept sets must be products of those of the dimensions."""

    grows = True

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = args[0]
        return x.reshape(shape)

    def _solve(self, facts: Analysis, node: fx.Node, kept: Kept) -> tuple[Kept, Kept]:
        """The smallest (input, output) kept sets around `kept` that describe the same elements."""
        source = arg(node, 0)
        before = tuple(facts.live[source].shape)
        after = tuple(len(vector) for vector in kept)
        want: Kept = [torch.zeros(0)] * len(before)
        have = list(kept)
        for ins, outs in runs_of(before, after):
            merged = [before[i] for i in ins if dims(source)[i] is None]
            merged += [after[o] for o in outs if dims(node)[o] is None]
            if any(size > 1 for size in merged):  # the batch and more: nothing can be left out
                for o in outs:
                    have[o] = torch.ones(after[o], dtype=torch.bool)
            new_in, new_out = _match([before[i] for i in ins], [have[o] for o in outs])
            for i, vector in zip(ins, new_in, strict=True):
                want[i] = vector
            for o, vector in zip(outs, new_out, strict=True):
                have[o] = vector
        return want, have

    def close(self, facts: Analysis, node: fx.Node, kept: Kept) -> None:
        kept[:] = self._solve(facts, node, kept)[1]

    def want(self, facts: Analysis, node: fx.Node, kept: Kept) -> Kept:
        return self._solve(facts, node, kept)[0]

    def write(self, build: Builder, node: fx.Node, kept: Kept, x: Ref) -> Ref:
        dims = node.meta["dims"]
        sizes = [-1 if s is None else int(k.sum()) for s, k in zip(dims, kept, strict=True)]
        return build.op(node, node.target, x, sizes)


def runs_of(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Cut two shapes of equal size into the shortest runs of dimensions of equal product."""
    runs = []
    i = j = 0
    while i < len(before) or j < len(after):
        ins, outs = [i][: len(before) - i], [j][: len(after) - j]
        i, j = i + len(ins), j + len(outs)
        while True:
            left, right = (math.prod(s[k] for k in d) for s, d in ((before, ins), (after, outs)))
            if left == right:
                break
            if left < right:
                ins.append(i)
                i += 1
            else:
                outs.append(j)
                j += 1
        runs.append((ins, outs))
    return runs


def _match(before: list[int], after: Kept) -> tuple[Kept, Kept]:
    """Grow the kept sets of one run until both sides are products of the same elements."""
    sizes = [len(vector) for vector in after]
    chosen = _product(after)
    while True:
        ins, outs = _project(chosen, before), _project(chosen, sizes)
        grown = _product(ins) | _product(outs)
        if torch.equal(grown, chosen):
            return ins, outs
        chosen = grown


def _product(kept: Kept) -> Tensor:
    """The elements of a box, flat."""
    box = torch.ones(1, dtype=torch.bool)
    for vector in kept:
        box = (box[:, None] & vector).flatten()
    return box


def _project(chosen: Tensor, sizes: list[int]) -> Kept:
    """The shadow of some elements of a box on each of its dimensions."""
    box = chosen.reshape(sizes)
    others = [[a for a in range(len(sizes)) if a != d] for d in range(len(sizes))]
    return [box.any(dim=axes) if axes else box for axes in others]
