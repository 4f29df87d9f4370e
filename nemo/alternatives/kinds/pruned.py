"""The standard model cut down by magnitude, one ratio for all layers, by torch-pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo.alternatives.registry import alternative

if TYPE_CHECKING:
    from torch import nn

    from nemo.alternatives.context import Context


@alternative("pruned", label="pruned", budget=True)
def pruned(context: Context) -> nn.Module:
    """
    Raises:
        ValueError: torch-pruning is not installed, or the model cannot be made that small.
    """
    from nemo.alternatives.pruning import prune

    return prune(context, "pruned", context.standard)
