"""The rule of LSTMs (ours). Letters: B batch, T time, C input channels, H hidden units."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from nemo.cut.builder import Builder
from nemo.cut.facts import Analysis, Kept
from nemo.cut.graph import arg, aten, lstm_outputs
from nemo.cut.rules.base import Demand, Rule, Shape, full, rule, tensors_in
from nemo.module.program import Ref


def first_layer(node: fx.Node) -> list[tuple[fx.Node, fx.Node | None]]:
    """The weight (4H, C) and the bias (4H,) that read the input, once per direction."""
    parameters, biased, layers = arg(node, 2), arg(node, 3), arg(node, 4)
    directions = 2 if arg(node, 7) else 1
    per_direction = len(parameters) // (layers * directions)  # a projection is one more
    starts = range(0, per_direction * directions, per_direction)
    return [(parameters[i], parameters[i + 2] if biased else None) for i in starts]


@rule(lstm_outputs)
class Lstm(Rule):
    """Every output depends on all hidden units, so only input channels can be left out."""

    blocks = False

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        x, parameters = args[0], list(args[2])
        places = [arg(node, 2).index(weight) for weight, _ in first_layer(node)]
        columns = torch.stack([parameters[i].sum(0) for i in places]).sum(0)
        others = [p for i, p in enumerate(parameters) if i not in places]
        total = torch.stack([t.sum() for t in tensors_in((args[1], others))]).sum()
        time = 1 if arg(node, 8) else 0
        mixed: Tensor = (x * columns).sum((time, 2), keepdim=True) + total
        return mixed.expand(shape)

    def demand(self, facts: Analysis, node: fx.Node, kept: Kept) -> Demand:
        demand = super().demand(facts, node, kept)
        x = arg(node, 0)
        columns = facts.nonzero(x).flatten(0, -2).any(0)
        columns &= torch.stack([(facts.value[w] != 0).any(0) for w, _ in first_layer(node)]).any(0)
        if not columns.any():
            columns[0] = True
        demand[x] = [*full(facts, x)[:2], columns]
        return demand

    def emit(self, build: Builder, node: fx.Node, kept: Kept) -> Ref:
        demand = self.demand(build.facts, node, kept)
        columns = demand[arg(node, 0)][2]
        reading = [weight for weight, _ in first_layer(node)]

        def fetch(n: fx.Node) -> Any:
            if n not in reading:
                return build.fetch(n, demand.get(n, []))
            value = {"value": build.facts.value[n][:, columns].contiguous()}
            path = build.facts.traced.paths.get(n, n.name)
            return build.layer(n, "Constant", {"trainable": True}, value, name=path)

        args = fx.map_arg(node.args, fetch)
        return build.op(node, operator.getitem, build.op(node, aten.lstm.input, *args), 0)
