"""ViT-Small and DeiT-Small, built from timm (its VisionTransformer), at 4 x 4 patches."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from nemo.models.registry import model
from nemo.models.shapes import DeitShape, VitShape


def _options(num_classes: int, image_size: int, shape: VitShape) -> dict[str, Any]:
    if image_size % shape.patch:
        raise ValueError(
            f"architecture: patch {shape.patch} must divide the image size {image_size}"
        )
    return {
        "img_size": image_size,
        "patch_size": shape.patch,
        "embed_dim": shape.dim,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "num_classes": num_classes,
        "norm_layer": partial(nn.LayerNorm, eps=1e-12),
    }


@model("vit_small", "transformer", VitShape)
def vit_small(num_classes: int, image_size: int, shape: VitShape | None) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer  # timm takes seconds to import

    return VisionTransformer(**_options(num_classes, image_size, shape or VitShape()))  # type: ignore[no-any-return]


@model("deit_small", "transformer", DeitShape)
def deit_small(num_classes: int, image_size: int, shape: DeitShape | None) -> nn.Module:
    """With a distillation token; the logits are the mean of its two heads. After
    `set_distilled_training(True)`, train mode returns both heads' logits instead."""
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(**_options(num_classes, image_size, shape or DeitShape()))  # type: ignore[no-any-return]
