"""Phase 4: which indices of each tensor the module computes, per dimension (ours).

One pass from the output to the input. A tensor starts with the hull of the elements that must be
computed; it grows where its op can only produce more (whole groups, rectangular heads), and where
a reader would otherwise have to pad it. Growing is always safe: it computes a constant, or a value
nobody reads.
"""

from __future__ import annotations

import torch
from torch import fx

from nemo.cut.facts import Analysis, Kept, inputs_of, is_index
from nemo.cut.rules.pointwise import Pointwise


def plan(facts: Analysis) -> dict[fx.Node, Kept]:
    """The kept indices of every node that is computed."""
    kept = {node: facts.hull(node) for node in facts.live if facts.present(node)}
    inputs = facts.traced.inputs
    kept.update((n, [torch.ones_like(v) for v in facts.hull(n)]) for n in inputs)
    for node in reversed(facts.traced.calls()):
        if node not in kept:
            continue
        rule = facts.rule(node)
        rule.close(facts, node, kept[node])
        for source, want in rule.demand(facts, node, kept[node]).items():
            if source in kept and source not in inputs and (rule.grows or _is_sum(facts, source)):
                kept[source] = [a | b for a, b in zip(kept[source], want, strict=True)]
    return kept


def blocked(facts: Analysis, kept: dict[fx.Node, Kept]) -> list[str]:
    """The ops without a rule that asked for more of an input than is needed otherwise."""
    names = set()
    for node in facts.traced.calls():
        if node in kept and facts.rule(node).blocks:
            for source in inputs_of(facts, node):
                if (
                    source in kept
                    and not is_index(facts.value[source])
                    and source not in facts.traced.inputs
                    and not all(bool(v.all()) for v in facts.hull(source))
                ):
                    names.add(str(node.target))
    return sorted(names)


def _is_sum(facts: Analysis, node: fx.Node) -> bool:
    """Sums pad their operands anyway: they may as well do it to the width their reader wants."""
    if not isinstance(facts.rule(node), Pointwise) or node.target is not torch.ops.aten.add.Tensor:
        return False
    return sum(facts.present(n) for n in inputs_of(facts, node)) > 1
