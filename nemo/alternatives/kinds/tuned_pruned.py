"""The standard model fine-tuned on the subset's classes, and then cut down by magnitude."""

from __future__ import annotations

from functools import partial
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

    return prune(context, "tuned-pruned", partial(tuned, context))


def tuned(context: Context) -> nn.Module:
    """The standard model after all of the fine-tuning."""
    from nemo.masking.sites import head_names
    from nemo.models import family_named
    from nemo.training.finetune import finetune

    params, cell, model = context.params, context.cell, context.standard()
    part = context.data.restrict(context.classes())
    heads = head_names(model, len(part.classes)) if params.finetune.head == "new" else []
    title = f"{cell.name} {context.subset} standard"
    finetune(model, part, family_named(cell.model), params, cell.seed, title, heads=heads)
    return model.cpu().eval()
