"""Where a module that fails its proof starts to differ from the graph it was cut from (ours)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo.cut.builder import Builder
from nemo.cut.facts import Kept
from nemo.cut.trace import evaluate, module_path
from nemo.module.check import SEED
from nemo.module.decomposed import DecomposedModule


def first_difference(module: DecomposedModule, build: Builder, tolerance: float) -> str:
    """The first layer, in the order they run, whose output differs where it is needed."""
    facts = build.facts
    inputs = module.takes.draw(1, SEED)
    theirs = evaluate(facts.traced, inputs)
    ours: dict[str, Any] = dict(zip(module.takes.names, inputs, strict=True))
    with torch.no_grad():
        for step in module.steps:
            try:
                module.advance(step, ours)
            except RuntimeError:
                return step.name
    for node, ref in build.values.items():
        value = ours.get(ref.name)
        if isinstance(value, Tensor) and _differs(
            theirs[node], value, facts.elements(node), build.kept[node], tolerance
        ):
            return f"{module_path(node) or 'the top module'} ({node.name})"
    return "the batch: one sample alone is right"


def _differs(theirs: Tensor, ours: Tensor, needed: Tensor, kept: Kept, tolerance: float) -> bool:
    for d, vector in enumerate(kept):
        index = vector.nonzero().flatten()
        theirs, needed = theirs.index_select(d, index), needed.index_select(d, index)
    if theirs.shape != ours.shape:
        return True
    theirs, ours = theirs.double(), ours.double()  # ids, too
    error = (theirs - ours).abs()[needed]
    return not bool((error <= tolerance * max(float(theirs.std()), 1e-300)).all())
