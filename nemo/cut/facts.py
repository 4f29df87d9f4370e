"""Phase 3: which elements of which tensor depend on the inputs, and which the result needs (ours).

At batch 1 every tensor gets three facts per element: its value in one run of the masked model, if
it is live (changes with the inputs; else the value is a constant), and if it is needed. Both are
derivatives of one non-negative stand-in per op, the `flow` of its rule: forward mode says where a
live input arrives (a product with a constant zero stops it), backward mode what a needed output
asks for. So a masked k channel kills its q channel, and a masked gate the branch that computes it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from nemo.cut.graph import unexpanded
from nemo.cut.trace import Traced, evaluate

Kept = list[Tensor]  # per dimension, a bool vector: the indices that are computed


class Analysis:
    """The facts. Tensors have the shape of the value at batch 1; a tuple value has shape (1,)."""

    def __init__(self, traced: Traced, rule: Callable[[Analysis, fx.Node], Any]) -> None:
        self.traced = traced
        self._rule = rule
        self.value: dict[fx.Node, Any] = {}
        self.live: dict[fx.Node, Tensor] = {}
        self.need: dict[fx.Node, Tensor] = {}
        self._moves: dict[fx.Node, bool] = {}

    def rule(self, node: fx.Node) -> Any:
        """The rule of a node's op, given what is known of its inputs."""
        return self._rule(self, node)

    def moves(self, node: fx.Node) -> bool:
        """Whether some element is live. Kept, since parameters are as large as the model."""
        if node not in self._moves:
            self._moves[node] = bool(self.live[node].any())
        return self._moves[node]

    def elements(self, node: fx.Node) -> Tensor:
        """What must be computed: the elements that are live and needed."""
        return self.live[node] & self.need[node]

    def present(self, node: fx.Node) -> bool:
        """False if the node is constant, or not needed at all."""
        return node in self.live and self.moves(node) and bool(self.elements(node).any())

    def nonzero(self, node: fx.Node) -> Tensor:
        """Where the value may differ from zero."""
        value = self.value[node]
        if not isinstance(value, Tensor):
            return torch.ones(1, dtype=torch.bool)
        return self.live[node] | (value != 0)

    def constant(self, node: fx.Node) -> Tensor:
        """The value where it is constant, else 0."""
        value: Tensor = self.value[node]
        return value.masked_fill(self.live[node], 0) if self.moves(node) else value

    def hull(self, node: fx.Node) -> Kept:
        """Per dimension, the indices at which some element must be computed."""
        elements = self.elements(node)
        axes = range(elements.ndim)
        kept = [elements.any(dim=[a for a in axes if a != d]) if elements.ndim > 1 else elements
                for d in axes]  # fmt: skip
        for d, size in enumerate(node.meta.get("dims") or ()):
            if size is None:
                kept[d] = torch.ones_like(kept[d])
        return kept


def analyse(traced: Traced, rule: Any, inputs: Sequence[Tensor], wanted: Tensor | None) -> Analysis:
    """Run the graph on one sample and derive the facts.

    Args:
        wanted: bool (outputs,), the entries of the last dimension of the output that are needed.
    """
    facts = Analysis(traced, rule)
    facts.value = evaluate(traced, inputs)
    for node in facts.value:
        if node.op == "placeholder":
            # One element, repeated: parameters are as large as the model.
            facts.live[node] = torch.tensor(node in traced.inputs).expand(facts.value[node].shape)
    with warnings.catch_warnings():  # of torch itself, when it first loads its derivatives
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        for node in traced.calls():
            _spread(facts, node)
    for node, live in facts.live.items():
        facts.need[node] = torch.zeros_like(live) if facts.moves(node) else live
    everything = torch.ones_like(facts.live[traced.output])
    facts.need[traced.output] = everything if wanted is None else everything & wanted
    for node in reversed(traced.calls()):
        _require(facts, node)
    return facts


def inputs_of(facts: Analysis, node: fx.Node) -> list[fx.Node]:
    """The inputs of a node that are tensors (or tuples of tensors)."""
    return [n for n in node.all_input_nodes if n in facts.live]


def _flow(facts: Analysis, node: fx.Node, moving: list[fx.Node]) -> Callable[..., Tensor]:
    """The op's flow as a function of its live inputs.

    The other inputs stay at `nonzero`, but for indices, which stay what they are.
    """
    value = facts.value[node]
    shape = tuple(value.shape) if isinstance(value, Tensor) else (1,)

    def function(*hot: Tensor) -> Tensor:
        table = dict(zip(moving, hot, strict=True))

        def argument(n: fx.Node) -> Any:
            if n in table:
                return table[n]
            constant = facts.value[n]
            if n not in facts.live or is_index(constant):
                return constant
            return facts.nonzero(n).float()

        args, kwargs = fx.map_arg((node.args, node.kwargs), argument)
        flow: Tensor = facts.rule(node).flow(node, shape, *args, **kwargs)
        return flow

    return function


def is_index(value: Any) -> bool:
    """Whether it is a tensor of integers, such as ids."""
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def _spread(facts: Analysis, node: fx.Node) -> None:
    """Set `live` of a node from that of its inputs."""
    value = facts.value[node]
    if not isinstance(value, (Tensor, tuple, list)):
        return  # an int: a size
    shape = tuple(value.shape) if isinstance(value, Tensor) else (1,)
    moving = [n for n in inputs_of(facts, node) if facts.moves(n)]
    if not moving:
        facts.live[node] = torch.zeros(shape, dtype=torch.bool)
        return
    if facts.rule(node).wakes:
        moving = inputs_of(facts, node)  # parameters too
    points = tuple(facts.nonzero(n).float() for n in moving)
    directions = tuple(_direction(facts, n).float() for n in moving)
    change = torch.func.jvp(_flow(facts, node, moving), points, directions)[1]
    facts.live[node] = change > 0


def _direction(facts: Analysis, node: fx.Node) -> Tensor:
    """`live`, or `nonzero` of a parameter (but not of a value that a mask made constant)."""
    is_parameter = unexpanded(node) in facts.traced.constants
    return facts.nonzero(node) if is_parameter else facts.live[node]


def _require(facts: Analysis, node: fx.Node) -> None:
    """Add what a node asks for to `need` of its inputs."""
    if node not in facts.live or not facts.present(node):
        return
    moving = [n for n in inputs_of(facts, node) if facts.moves(n)]
    points = tuple(facts.nonzero(n).float() for n in moving)
    pull: Any = torch.func.vjp(_flow(facts, node, moving), *points)[1]
    for source, change in zip(moving, pull(facts.elements(node).float()), strict=True):
        facts.need[source] |= change > 0
