"""What a rule is, and the rules of ops that act element by element or along dimensions (ours).

A rule answers four questions about its op. `flow`: a non-negative stand-in for it, from which
`analyse` derives what is live and what is needed. `close`: which kept sets its output can have.
`demand`: what it then has to be given. `emit`: the steps that compute it. The base class knows
nothing of its op and asks for everything: exact, without saving.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from nemo.cut.facts import Analysis, Kept, inputs_of
from nemo.cut.graph import arg, aten
from nemo.module.steps import INPUT, Ref

if TYPE_CHECKING:
    from nemo.cut.rewrite import Builder

Demand = dict[fx.Node, Kept]
Shape = tuple[int, ...]


class Rule:
    """An op nobody has described: every output element depends on all inputs."""

    blocks = True  # named in the report when it stops a saving
    wakes = False  # whether constants of the trace count as live from here on
    grows = False  # whether its inputs had better compute a bit more than be padded for it

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        """The stand-in, on non-negative tensors in place of the op's; `shape` is the output's."""
        total = torch.stack([t.sum() for t in tensors_in((args, kwargs))]).sum()
        return total.expand(shape)

    def close(self, facts: Analysis, node: fx.Node, kept: Kept) -> None:
        """Grow the output's kept sets, in place, to what the op can produce."""
        for vector in kept:
            vector[:] = True

    def demand(self, facts: Analysis, node: fx.Node, kept: Kept) -> Demand:
        """The indices of each input that are read, given closed kept sets of the output."""
        return {n: full(facts, n) for n in inputs_of(facts, node)}

    def emit(self, build: Builder, node: fx.Node, kept: Kept) -> Ref:
        """Append the steps that compute the output at `kept`."""
        demand = self.demand(build.facts, node, kept)
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: build.fetch(n, demand.get(n, []))
        )
        return build.op(node, node.target, *args, **kwargs)


def full(facts: Analysis, node: fx.Node) -> Kept:
    return [torch.ones(size, dtype=torch.bool) for size in facts.live[node].shape]


def copied(kept: Kept) -> Kept:
    return [vector.clone() for vector in kept]


def aligned(kept: Kept, shape: Shape) -> Kept:
    """What an operand of `shape`, broadcast against a result kept at `kept`, has to hold."""
    tail = kept[len(kept) - len(shape) :]
    return [
        vector.clone() if size == len(vector) else torch.ones(size, dtype=torch.bool)
        for vector, size in zip(tail, shape, strict=True)
    ]


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (tuple, list)) else []


class GetItem(Rule):
    """One of several results of an op; its input is a tuple, of which nothing is known."""

    blocks = False


class Pointwise(Rule):
    """out[i] depends on the [i] of each input, with broadcasting.

    Args:
        combine: "sum" for any op; "product" and "quotient" stop at constant zeros.
    """

    blocks = False

    def __init__(self, combine: str = "sum") -> None:
        self.combine = combine

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        first, *others = tensors_in((args, kwargs))
        if others and self.combine == "product":
            return (first * others[0]).expand(shape)
        if others and self.combine == "quotient":
            return (first * (1 + others[0])).expand(shape)
        result = first.expand(shape)
        for other in others:
            result = result + other.expand(shape)
        return result

    def close(self, facts: Analysis, node: fx.Node, kept: Kept) -> None:
        pass

    def demand(self, facts: Analysis, node: fx.Node, kept: Kept) -> Demand:
        return {n: aligned(kept, facts.live[n].shape) for n in inputs_of(facts, node)}

    def emit(self, build: Builder, node: fx.Node, kept: Kept) -> Ref:
        demand = self.demand(build.facts, node, kept)
        if node.target is aten.add.Tensor and not node.kwargs:
            added = self._residual(build, node, demand)
            if added is not None:
                return added
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs),
            lambda n: build.fetch(n, demand.get(n, []), broadcast=True),
        )
        return build.op(node, node.target, *args, **kwargs)

    def _residual(self, build: Builder, node: fx.Node, demand: Demand) -> Ref | None:
        """x + y where y is a few channels of x wide: add it there instead of padding it."""
        facts = build.facts
        if len(demand) < 2 or not all(facts.present(n) for n in demand):
            return None
        if len({facts.live[n].shape for n in demand}) > 1:
            return None
        lacks = [build.missing(n, demand[n]) for n in demand]
        nodes = list(demand)
        into = min((0, 1), key=lambda i: sum(int(m.sum()) for m in lacks[i]))
        x, y, absent = nodes[into], nodes[1 - into], lacks[1 - into]
        dims = [d for d, vector in enumerate(absent) if vector.any()]
        if len(dims) != 1 or build.template(y, demand[y], absent).any():
            return None
        dim, want = dims[0], demand[y]
        have = [w & ~m for w, m in zip(want, absent, strict=True)]
        if not have[dim].any():  # nothing of y is wanted
            return None
        index = have[dim][want[dim]].nonzero().flatten()
        left, right = build.fetch(x, demand[x]), build.fetch(y, have)
        return build.layer(node, "AddInto", {"dim": dim}, {"index": index}, left, right)


class Cast(Pointwise):
    """type_as(x, images): of the images, only the type is read."""

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = args[0]
        return x

    def demand(self, facts: Analysis, node: fx.Node, kept: Kept) -> Demand:
        return {arg(node, 0): copied(kept)}

    def emit(self, build: Builder, node: fx.Node, kept: Kept) -> Ref:
        return build.op(node, node.target, build.fetch(arg(node, 0), kept), Ref(INPUT))


class OneInput(Rule):
    """Base of ops where only the first argument changes; `want` and `write` replace the rest."""

    blocks = False

    def close(self, facts: Analysis, node: fx.Node, kept: Kept) -> None:
        pass

    def want(self, facts: Analysis, node: fx.Node, kept: Kept) -> Kept:
        """The indices of the input that are read."""
        return copied(kept)

    def write(self, build: Builder, node: fx.Node, kept: Kept, x: Ref) -> Ref:
        """The step, given the input at these indices."""
        return build.op(node, node.target, x, *node.args[1:], **node.kwargs)

    def demand(self, facts: Analysis, node: fx.Node, kept: Kept) -> Demand:
        return {arg(node, 0): self.want(facts, node, kept)}

    def emit(self, build: Builder, node: fx.Node, kept: Kept) -> Ref:
        x = build.fetch(arg(node, 0), self.want(build.facts, node, kept))
        return self.write(build, node, kept, x)


class Along(OneInput):
    """Mixes its input along some dimensions, and treats all others alike.

    Args:
        mixed: from the node and the input's rank to those dimensions.
    """

    def __init__(self, mixed: Callable[[fx.Node, int], list[int]]) -> None:
        self.mixed = mixed

    def dims(self, node: fx.Node, rank: int) -> list[int]:
        return [d % rank for d in self.mixed(node, rank)]

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


class Total(Along):
    """A sum or a norm: constant zeros can be left out."""

    def want(self, facts: Analysis, node: fx.Node, kept: Kept) -> Kept:
        source, want = arg(node, 0), super().want(facts, node, kept)
        nonzero = facts.nonzero(source)
        for d in self.dims(node, len(want)):
            if source.meta["dims"][d] is not None:
                want[d] = nonzero.any(dim=[a for a in range(nonzero.ndim) if a != d])
        return want
