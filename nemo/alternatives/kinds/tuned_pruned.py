"""The standard model fine-tuned on the subset's classes, and then cut down by magnitude."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo.alternatives.registry import alternative

if TYPE_CHECKING:
    from torch import nn

    from nemo.alternatives.context import Context


@alternative("tuned-pruned", label="tuned, pruned", budget=True)
def tuned_pruned(context: Context) -> nn.Module:
    """
    Raises:
        ValueError: torch-pruning is not installed, or the model cannot be made that small.
    """
    from nemo.alternatives.pruning import prune

    return prune(context, "tuned-pruned", context.tuned)
