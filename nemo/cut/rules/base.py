"""What a rule is, and where it is registered (ours).

A rule answers four questions about its op. `flow`: a non-negative stand-in for it, from which
`analyse` derives what is live and what is needed. `close`: which kept sets its output can have.
`demand`: what it then has to be given. `emit`: the steps that compute it. The base class knows
nothing of its op and asks for everything: exact, without saving.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from nemo.cut.builder import Builder
from nemo.cut.facts import Analysis, Kept, inputs_of
from nemo.cut.graph import arg
from nemo.module.ops import OPS, allow, name_of
from nemo.module.program import Ref

Demand = dict[fx.Node, Kept]
Shape = tuple[int, ...]
R = TypeVar("R", bound="type[Rule]")


class Rule:
    """An op nobody has described: every output element depends on all inputs."""

    blocks = True  # named in the report when it stops a saving
    wakes = False  # whether constants of the trace count as live from here on
    grows = False  # whether its inputs had better compute a bit more than be padded for it

    def applies(self, facts: Analysis, node: fx.Node) -> bool:
        """Whether the rule understands this call; else it is taken for an unknown op's."""
        return True

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


RULES: dict[Any, Rule] = {}
UNKNOWN = Rule()


def rule(*ops: Any, **settings: Any) -> Callable[[R], R]:
    """A decorator that makes a class, with `settings`, the rule of `ops`.

    Modules may run the ops from then on, in this process: a file that needs one of a plugin is
    refused where the plugin is not imported.

    Raises:
        ValueError: an op that is no overload, or that writes into its arguments.
    """

    def register(kind: R) -> R:
        made = kind(**settings)
        for op in ops:
            if isinstance(op, torch._ops.OpOverloadPacket):
                raise ValueError(f"rule: {op} is not one op; accepted: {op}.{op.overloads()[0]}")
            if isinstance(op, torch._ops.OpOverload) and name_of(op) not in OPS:
                allow(op)
            RULES[op] = made
        return kind

    return register


def rule_of(facts: Analysis, node: fx.Node) -> Rule:
    """The rule of a node, or that of an unknown op."""
    found = RULES.get(node.target, UNKNOWN)
    return found if found.applies(facts, node) else UNKNOWN


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


@rule(operator.getitem)
class GetItem(Rule):
    """One of several results of an op; its input is a tuple, of which nothing is known."""

    blocks = False


class OneInput(Rule):
    """Base of ops where only the first argument changes; `want` and `write` replace the rest."""

    blocks = False

    def applies(self, facts: Analysis, node: fx.Node) -> bool:
        moving = [n for n in inputs_of(facts, node) if facts.moves(n)]
        return moving in ([node.args[0]], [])

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
