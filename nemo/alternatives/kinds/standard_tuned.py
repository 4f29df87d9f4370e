"""The standard model, whole, with its classifier restricted to the subset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo.alternatives.registry import alternative

if TYPE_CHECKING:
    from torch import nn

    from nemo.alternatives.context import Context


@alternative("standard-tuned", label="standard, tuned", budget=False)
def whole(context: Context) -> nn.Module:
    return context.standard()
