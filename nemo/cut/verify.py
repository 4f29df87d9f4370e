"""Phase 6: the proof. The module against the masked model, in float64, on random images (ours)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo.cut.builder import Builder
from nemo.cut.facts import Kept
from nemo.cut.trace import evaluate, module_path
from nemo.module.check import BATCHES, SEED, ExactnessError, logits_of
from nemo.module.decomposed import DecomposedModule
from nemo.module.program import INPUT

# If logits vary less than this between images, relative to their size, the check says little: most
# of the network may be dead.
VACUOUS = 1e-6
# What float64 may lose, relative to the size of the logits; it matters where they hardly vary.
ROUNDING = 1e-13


def verify(
    module: DecomposedModule, expected: Tensor, build: Builder, tolerance: float
) -> dict[str, Any]:
    """Compare the module, in float64, with `expected`, the logits of its masked parent.

    Args:
        tolerance: largest error allowed, relative to the standard deviation of `expected`.

    Returns:
        The certificate: error (relative), absolute_error, output_std, tolerance, batches, vacuous.

    Raises:
        ExactnessError: beyond the tolerance; it names the layer where the difference starts.
    """
    try:
        actual = logits_of(module, module.input_size)
    except RuntimeError as failure:
        where = first_difference(module, build, tolerance)
        raise ExactnessError(f"the module does not run from {where} on: {failure}") from failure
    std = float(expected.std())
    spread = float((expected - expected.mean(0)).square().mean().sqrt())
    same_shape = actual.shape == expected.shape
    absolute = float((expected - actual).abs().max()) if same_shape else float("inf")
    error = absolute / std if std > 0 else absolute
    scale = float(expected.abs().max())
    if not absolute <= max(tolerance * std, ROUNDING * scale):
        where = first_difference(module, build, tolerance)
        raise ExactnessError(
            f"the module differs from its masked parent by {error:.3g} of the output's standard "
            f"deviation (tolerance {tolerance:.3g}); the difference starts at {where}"
        )
    return {
        "error": error,
        "absolute_error": absolute,
        "output_std": std,
        "tolerance": tolerance,
        "batches": list(BATCHES),
        "vacuous": spread <= VACUOUS * scale,
    }


def first_difference(module: DecomposedModule, build: Builder, tolerance: float) -> str:
    """The first layer, in the order they run, whose output differs where it is needed."""
    facts = build.facts
    image = torch.randn(
        1, *module.input_size, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64
    )
    theirs = evaluate(facts.traced, image)
    ours: dict[str, Any] = {INPUT: image}
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
    return "the batch: one image alone is right"


def _differs(theirs: Tensor, ours: Tensor, needed: Tensor, kept: Kept, tolerance: float) -> bool:
    for d, vector in enumerate(kept):
        index = vector.nonzero().flatten()
        theirs, needed = theirs.index_select(d, index), needed.index_select(d, index)
    if theirs.shape != ours.shape:
        return True
    error = (theirs - ours).abs()[needed]
    return not bool((error <= tolerance * max(float(theirs.std()), 1e-300)).all())
