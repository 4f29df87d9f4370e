"""Helpers for fx graphs of ATen ops (ours).

`meta["dims"]` of a node is its shape, with None where the batch size enters, alone or merged with
other dimensions; it is None for what is not a tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
Dims = tuple[int | None, ...]


def dims_of(value: Any) -> Dims | None:
    """The shape of a traced value, None where the batch enters; None for what is not a tensor."""
    if not isinstance(value, Tensor):
        return None
    return tuple(size if type(size) is int else None for size in value.shape)


def arg(node: fx.Node, position: int, default: Any = None) -> Any:
    """A positional argument of a call, or the default that its op has."""
    return node.args[position] if len(node.args) > position else default


def unexpanded(node: fx.Node) -> fx.Node:
    """What was expanded to make this value; itself, if it is no expansion."""
    while node.op == "call_function" and node.target is aten.expand.default:
        node = arg(node, 0)
    return node


def run(node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """Apply a node's op to other arguments."""
    assert callable(node.target)
    return node.target(*args, **kwargs)


def dims(node: fx.Node) -> Dims:
    """The shape of a tensor's node, None where the batch enters."""
    known: Dims = node.meta["dims"]
    return known


class Rewriter:
    """Appends normal-form ops before a node that is being replaced."""

    def __init__(self, graph: fx.Graph, old: fx.Node) -> None:
        self.graph, self.old = graph, old

    def call(self, op: Any, args: tuple[Any, ...], dims: Dims) -> fx.Node:
        with self.graph.inserting_before(self.old):
            node = self.graph.call_function(op, args)
        node.meta = {"nn_module_stack": self.old.meta.get("nn_module_stack"), "dims": dims}
        return node

    def reshape(self, node: fx.Node, dims: Dims) -> fx.Node:
        if node.meta["dims"] == dims:
            return node
        sizes = [-1 if size is None else size for size in dims]
        return self.call(aten.reshape.default, (node, sizes), dims)

    def permute(self, node: fx.Node, order: list[int]) -> fx.Node:
        dims = node.meta["dims"]
        return self.call(aten.permute.default, (node, order), tuple(dims[i] for i in order))

    def slice(self, node: fx.Node, dim: int, start: int, stop: int, step: int = 1) -> fx.Node:
        dims = list(node.meta["dims"])
        dims[dim] = len(range(start, stop, step))
        args = (node, dim, start, stop, step)
        return self.call(aten.slice.Tensor, args, tuple(dims))

    def cat(self, nodes: list[fx.Node], dim: int) -> fx.Node:
        dims = list(nodes[0].meta["dims"])
        sizes = [node.meta["dims"][dim] for node in nodes]
        dims[dim] = None if None in sizes else sum(sizes)
        return self.call(aten.cat.default, (nodes, dim), tuple(dims))


def as_weights(x: Tensor) -> Tensor:
    """A cast to the type of the weights, which are traced in float64."""
    return x.double()


def lstm_outputs(x: Tensor, states: list[Tensor], parameters: list[Tensor], *rest: Any) -> Tensor:
    """The first of the three results of an LSTM: (B, T, units), or (T, B, units)."""
    result: Tensor = aten.lstm.input(x, states, parameters, *rest)[0]
    return result
