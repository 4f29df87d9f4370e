"""Decompose a masked model into a smaller one that computes the same logits (ours).

The paper (arXiv 2508.11348, section 4.4) cuts modules by one hand-written procedure per
architecture. Here one algorithm works on the traced graph of any model, in phases: `masking` zeroes
parameters, `trace` and `normal` give a graph of few ops, `facts` finds what is constant and what
is needed, `plan` chooses the indices to keep, `rewrite` writes the module, `verify` proves it.


Importing this costs nothing, so that those who only read results do not pay for torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nemo.cut.verify import ExactnessError
    from nemo.module.program import DecomposedModule

__all__ = ["DecomposedModule", "ExactnessError", "decompose"]


def decompose(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    classes: Sequence[int] | None = None,
    *,
    mode: str = "exact",
    example: Tensor | None = None,
    tolerance: float = 1e-9,
) -> DecomposedModule:
    """Cut the masked neurons out of a copy of `model`.

    Args:
        model: any module that torch.export accepts and that maps (B, C, H, W) images to one tensor,
            or a modular model, whose base is taken.
        masks: {layer: bool (N_l,)}, False for the neurons to remove.
        classes: the classes whose logits are returned, in this order; default `masks.classes` if
            there is such, else all.
        mode: "exact" computes what the masked model computes, proved by a check in float64.
            "compact" also drops channels of residual streams that their last writer masks off: it
            is smaller and not exact; the check is against the model without these channels.
        example: (B >= 1, C, H, W), only its shape matters; found from the model by default, which
            for a modular one is that of `modularize`.
        tolerance: of the check, relative to the standard deviation of the output.

    Raises:
        ValueError: unknown layers, masks that do not fit, classes that do not exist.
        ExactnessError: the check failed.
    """
    from nemo.cut.decomposer import decompose

    return decompose(model, masks, classes, mode=mode, example=example, tolerance=tolerance)


def __getattr__(name: str) -> Any:
    if name == "DecomposedModule":
        from nemo.module.program import DecomposedModule

        return DecomposedModule
    if name == "ExactnessError":
        from nemo.cut.verify import ExactnessError

        return ExactnessError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
