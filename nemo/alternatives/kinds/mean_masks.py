"""The module with each neuron scaled by its mask's mean over the subset's images, in place of 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo.alternatives.registry import alternative

if TYPE_CHECKING:
    from torch import nn

    from nemo.alternatives.context import Context


@alternative("mean-masks", label="mean masks", budget=True)
def mean_masks(context: Context) -> nn.Module:
    from nemo.cut import decompose
    from nemo.masking.constant import mean_scales, scaled

    modular = context.modular()
    images = context.data.restrict(context.classes())
    return decompose(scaled(modular, mean_scales(modular, images)).cpu(), context.masks(modular))
