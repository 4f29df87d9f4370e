"""Phase 5: write the module's steps, with parameters cut to the kept indices (ours)."""

from __future__ import annotations

import torch
from torch import fx

from nemo.cut.builder import Builder
from nemo.cut.facts import Analysis, Kept


def rewrite(facts: Analysis, kept: dict[fx.Node, Kept], classes: list[int] | None) -> Builder:
    """All steps of the module; its output are the logits of `classes` in their order."""
    build = Builder(facts, kept)
    traced = facts.traced
    for node in traced.calls():
        if node in kept:
            build.values[node] = facts.rule(node).emit(build, node, kept[node])
    want = [torch.ones(size, dtype=torch.bool) for size in facts.live[traced.output].shape]
    if classes is not None:
        want[-1] = torch.zeros_like(want[-1])
        want[-1][classes] = True
    output = build.fetch(traced.output, want)
    if classes is not None and classes != sorted(classes):
        index = torch.tensor([sorted(classes).index(c) for c in classes])
        last = {"dim": len(want) - 1}
        output = build.layer(traced.output, "Select", last, {"index": index}, output, name="order")
    build.output = output.name
    return build
