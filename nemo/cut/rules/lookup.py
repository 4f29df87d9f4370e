"""The rules of ops that look up rows by number (ours). Letters: V rows, C channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from nemo.cut.builder import Builder
from nemo.cut.facts import Analysis, Kept, inputs_of
from nemo.cut.graph import arg, aten
from nemo.cut.rules.base import Demand, Rule, Shape, copied, full, rule, tensors_in
from nemo.module.program import Ref


@rule(aten.embedding.default)
class Embedding(Rule):
    """weight (V, C) at ids (...): (..., C)."""

    blocks = False

    def applies(self, facts: Analysis, node: fx.Node) -> bool:
        return not facts.moves(arg(node, 0))

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        weight, ids = args[:2]
        result: Tensor = ids.unsqueeze(-1) * weight.amax(0)
        return result

    def close(self, facts: Analysis, node: fx.Node, kept: Kept) -> None:
        pass

    def demand(self, facts: Analysis, node: fx.Node, kept: Kept) -> Demand:
        return {arg(node, 1): copied(kept[:-1])}

    def emit(self, build: Builder, node: fx.Node, kept: Kept) -> Ref:
        ids = build.fetch(arg(node, 1), kept[:-1])
        weight = build.facts.value[arg(node, 0)][:, kept[-1]].contiguous()
        padding = arg(node, 2, -1)
        config = {"padding_idx": None if padding < 0 else padding}
        return build.layer(node, "Embedding", config, {"weight": weight}, ids)


@rule(aten.index.Tensor)
class Index(Rule):
    """x[i, j, ...]: the first dimensions are looked up, the others stay."""

    blocks = False

    def applies(self, facts: Analysis, node: fx.Node) -> bool:
        indices = arg(node, 1)
        rest = facts.live[arg(node, 0)].ndim - len(indices)
        moving = [n for n in inputs_of(facts, node) if facts.moves(n)]
        return None not in indices and rest > 0 and arg(node, 0) in moving

    def _rest(self, node: fx.Node) -> int:
        return len(arg(node, 0).meta["dims"]) - len(arg(node, 1))

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        x, indices = args
        moving = [i.sum() for i in tensors_in(indices) if i.is_floating_point()]
        found: Tensor = x.flatten(0, -1 - self._rest(node)).sum(0)
        return (found + sum(moving)).expand(shape)

    def close(self, facts: Analysis, node: fx.Node, kept: Kept) -> None:
        for vector in kept[: -self._rest(node)]:
            vector[:] = True

    def demand(self, facts: Analysis, node: fx.Node, kept: Kept) -> Demand:
        demand = super().demand(facts, node, kept)
        x, rest = arg(node, 0), self._rest(node)
        demand[x] = [*full(facts, x)[:-rest], *copied(kept[-rest:])]
        return demand
