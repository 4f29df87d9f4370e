"""The proof: a module computes what its masked parent computes, in float64, on random inputs.

The parent is the modular model itself, with constant masks where its generators were, or a model
that was trained elsewhere with the same hooks. Nothing here knows how a module is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo.module.check import BATCHES, SEED, ExactnessError, Run, logits_of
from nemo.module.decomposed import DecomposedModule
from nemo.signature import Signature

# If logits vary less than this between images, relative to their size, the check says little: most
# of the network may be dead.
VACUOUS = 1e-6
# What float64 may lose, relative to the size of the logits; it matters where they hardly vary.
ROUNDING = 1e-13


def expected_of(run: Run, takes: Signature, classes: list[int] | None) -> Tensor:
    """`logits_of` what a module is compared with.

    Raises:
        ValueError: they are not finite, so that no module could be right.
    """
    logits = logits_of(run, takes, classes)
    if not logits.isfinite().all():
        raise ValueError("the model's logits are not finite: are its weights?")
    return logits


def certify(
    module: DecomposedModule,
    expected: Tensor,
    tolerance: float,
    elsewhere: Sequence[Tensor] | None = None,
) -> dict[str, Any]:
    """Compare a module in float64 with the logits that are `expected` of it.

    Args:
        expected: `expected_of` a float64 copy of the parent under its masks, see `Modular.under`.
        tolerance: largest error allowed, relative to the standard deviation of `expected`.
        elsewhere: what the parent says `at_other_sizes`.

    Returns:
        The certificate: error (relative), absolute_error, output_std, tolerance, batches, vacuous,
        and fixed_size: whether the module is right for inputs of its own size only.

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
    allowed = max(tolerance * std, ROUNDING * scale)
    vacuous = spread <= VACUOUS * scale
    if not absolute <= allowed:
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
        "vacuous": vacuous,
        "fixed_size": vacuous or not _holds_elsewhere(module, elsewhere, allowed),
    }


def at_other_sizes(run: Run, takes: Signature, classes: list[int] | None) -> list[Tensor] | None:
    """What the parent says of an image of each of two other sizes; None if it refuses one.

    A network may compute with its input's size as a number, which a module has as a constant.
    """
    try:
        with torch.no_grad():
            logits = [run([image]) for image in _other_images(takes)]
    except Exception:  # whatever it says: it does not take them
        return None
    return [x if classes is None else x[..., classes] for x in logits] or None


def _other_images(takes: Signature) -> list[Tensor]:
    """One and a half times the size, and one that no stride divides; none of other inputs."""
    channels, *size = takes.inputs[0].shape or (0,)
    if not takes.plain or not size:
        return []
    sizes = [n + max(n // 2, 1) for n in size], [n + 1 + 2 * i for i, n in enumerate(size)]
    return [Signature.of_images((channels, *new)).draw(1, SEED)[0] for new in sizes]


def _holds_elsewhere(
    module: DecomposedModule, expected: Sequence[Tensor] | None, allowed: float
) -> bool:
    if expected is None:
        return False
    module.certificate = {"fixed_size": False}  # so that it takes them, right or wrong
    actual = at_other_sizes(module.run, module.takes, None)
    return actual is not None and all(
        a.shape == e.shape and float((a - e).abs().max()) <= allowed
        for a, e in zip(actual, expected, strict=True)
    )
