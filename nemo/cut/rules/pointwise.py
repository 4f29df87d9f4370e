"""The rules of ops that act element by element (ours)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from nemo.cut.builder import Builder, taken
from nemo.cut.facts import Analysis, Kept, inputs_of
from nemo.cut.graph import arg, as_weights, aten
from nemo.cut.rules.base import Demand, Rule, Shape, aligned, copied, rule, tensors_in
from nemo.module.ops import POINTWISE
from nemo.module.program import Ref


@rule(*POINTWISE)
class Pointwise(Rule):
    """out[i] depends on the [i] of each input, with broadcasting."""

    blocks = False

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        first, *others = tensors_in((args, kwargs))
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
            (node.args, node.kwargs), lambda n: build.fetch(n, demand.get(n, []), broadcast=True)
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


@rule(aten.mul.Tensor)
class Product(Pointwise):
    """x * y: constant zeros stop what flows; a mask of which only ones are left is no step."""

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        first, *others = tensors_in((args, kwargs))
        return (first * others[0] if others else first).expand(shape)

    def emit(self, build: Builder, node: fx.Node, kept: Kept) -> Ref:
        facts, x, factor = build.facts, arg(node, 0), arg(node, 1)
        constant = factor in facts.traced.constants and factor not in facts.traced.paths
        if constant and facts.live[x].shape == facts.live[node].shape:
            want = aligned(kept, facts.live[factor].shape)
            if bool((taken(facts.value[factor], want) == 1).all()):
                return cast(Ref, build.fetch(x, kept))
        return super().emit(build, node, kept)


@rule(aten.div.Tensor)
class Quotient(Pointwise):
    """x / y: constant zeros in x stop what flows."""

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        first, *others = tensors_in((args, kwargs))
        return (first * (1 + others[0]) if others else first).expand(shape)


@rule(aten.type_as.default, as_weights)
class Cast(Pointwise):
    """type_as(x, input): of the input, only the type is read. Or a cast to the weights' type."""

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = args[0]
        return x

    def demand(self, facts: Analysis, node: fx.Node, kept: Kept) -> Demand:
        return {arg(node, 0): copied(kept)}

    def emit(self, build: Builder, node: fx.Node, kept: Kept) -> Ref:
        x = build.fetch(arg(node, 0), kept)
        if node.target is as_weights:
            return build.layer(
                node, "Cast", {}, {"like": torch.zeros(0).double()}, x, name=node.name
            )
        return build.op(node, node.target, x, build.values[arg(node, 1)])
