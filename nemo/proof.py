"""The proof: a module computes what its masked parent computes, in float64, on random inputs.

The parent is the modular model itself, with constant masks where its generators were, or a model
that was trained elsewhere with the same hooks. Nothing here knows how a module is cut.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nemo.module.check import BATCHES, ExactnessError, logits_of
from nemo.module.decomposed import DecomposedModule

# If logits vary less than this between images, relative to their size, the check says little: most
# of the network may be dead.
VACUOUS = 1e-6
# What float64 may lose, relative to the size of the logits; it matters where they hardly vary.
ROUNDING = 1e-13


def certify(module: DecomposedModule, expected: Tensor, tolerance: float) -> dict[str, Any]:
    """Compare a module in float64 with the logits that are `expected` of it.

    Args:
        expected: `logits_of` a float64 copy of the parent under its masks, see `Modular.under`.
        tolerance: largest error allowed, relative to the standard deviation of `expected`.

    Returns:
        The certificate: error (relative), absolute_error, output_std, tolerance, batches, vacuous.

    Raises:
        ExactnessError: beyond the tolerance, or the module does not run.
    """
    try:
        actual = logits_of(module.run, module.takes)
    except RuntimeError as failure:
        raise ExactnessError(f"the module does not run: {failure}") from failure
    std = float(expected.std())
    spread = float((expected - expected.mean(0)).square().mean().sqrt())
    same_shape = actual.shape == expected.shape
    absolute = float((expected - actual).abs().max()) if same_shape else float("inf")
    error = absolute / std if std > 0 else absolute
    scale = float(expected.abs().max())
    if not absolute <= max(tolerance * std, ROUNDING * scale):
        raise ExactnessError(
            f"the module differs from its masked parent by {error:.3g} of the output's standard "
            f"deviation (tolerance {tolerance:.3g})"
        )
    return {
        "error": error,
        "absolute_error": absolute,
        "output_std": std,
        "tolerance": tolerance,
        "batches": list(BATCHES),
        "vacuous": spread <= VACUOUS * scale,
    }
