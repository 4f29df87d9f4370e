"""A narrower model of the same kind, trained from scratch on the subset alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo.alternatives.registry import alternative

if TYPE_CHECKING:
    from torch import nn

    from nemo.alternatives.context import Context
    from nemo.fields import Strict


@alternative("dense", label="dense", budget=True)
def dense(context: Context) -> nn.Module:
    """
    Raises:
        ValueError: the model's shape has neither a width nor a dim that could be smaller.
    """
    from nemo.models import CnnShape, VitShape, build_model

    name = context.cell.model
    shape = context.params.architecture.of(name)

    def narrower(share: float) -> nn.Module:
        if isinstance(shape, VitShape):
            dim = max(shape.heads, int(shape.dim * share) // shape.heads * shape.heads)
            smaller: Strict = shape.model_copy(update={"dim": dim})
        elif isinstance(shape, CnnShape):
            smaller = shape.model_copy(update={"width": shape.width * share})
        else:
            raise ValueError(
                f"{context.section}.kinds: dense needs a model with a width or a dim, and {name} "
                "has neither; leave it out"
            )
        return build_model(name, len(context.classes()), context.data.size[0], smaller)

    return context.largest(narrower)
