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
    from nemo.evaluation.modular import load_class_masks
    from nemo.masking.constant import mean_scales, scaled
    from nemo.trained import weights_sha256

    cell, layout, modular = context.cell, context.layout, context.modular()
    parent = weights_sha256(layout.train(cell))
    masks = load_class_masks(layout.masks(cell), modular.layers, parent).select(context.classes())
    images = context.data.restrict(context.classes())
    return decompose(scaled(modular, mean_scales(modular, images)).cpu(), masks)
