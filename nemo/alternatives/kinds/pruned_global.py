"""The standard model cut down by magnitude, the channels of all layers in one ranking."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo.alternatives.registry import alternative

if TYPE_CHECKING:
    from torch import nn

    from nemo.alternatives.context import Context


@alternative("pruned-global", label="pruned globally", budget=True)
def pruned_global(context: Context) -> nn.Module:
    """
    Raises:
        ValueError: torch-pruning is not installed, or the model cannot be made that small.
    """
    from nemo.alternatives.pruning import prune

    return prune(context, "pruned-global", context.standard, together=True)
