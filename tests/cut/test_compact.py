"""Compact mode against references written by hand: the model with the stream's channels gone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nemo.cut import decompose
from tests.cut.helpers import random_masks
from tests.cut.test_models import small
from tests.oracles.masked import masked_logits

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def silence(module: Any, keep: Tensor) -> None:
    for parameter in (module.weight, module.bias):
        if parameter is not None:
            parameter.data[~keep] = 0


class NarrowNorm(nn.Module):
    """LayerNorm over the channels `keep`; zero elsewhere."""

    def __init__(self, norm: nn.LayerNorm, keep: Tensor) -> None:
        super().__init__()
        self.norm, self.keep = norm, keep

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        weight, bias = self.norm.weight[self.keep], self.norm.bias[self.keep]
        y[..., self.keep] = F.layer_norm(
            x[..., self.keep], [int(self.keep.sum())], weight, bias, self.norm.eps
        )
        return y


def compact_resnet(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    stages: Any = model.stages
    for i, stage in enumerate(stages):
        keep = masks[f"stages.{i}.1.conv2"]
        writers = [stage[0].bn2, stage[1].bn2]
        writers.append(model.bn1 if i == 0 else stage[0].downsample[1])
        for writer in writers:
            silence(writer, keep)
    return model


def compact_vit(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    model: Any = copy.deepcopy(model)
    keep = masks[f"blocks.{len(model.blocks) - 1}.mlp.fc2"]
    silence(model.patch_embed.proj, keep)
    for name in ("cls_token", "dist_token", "pos_embed"):
        if getattr(model, name, None) is not None:
            getattr(model, name).data[..., ~keep] = 0
    for block in model.blocks:
        silence(block.attn.proj, keep)
        silence(block.mlp.fc2, keep)
        block.norm1, block.norm2 = NarrowNorm(block.norm1, keep), NarrowNorm(block.norm2, keep)
    model.norm = NarrowNorm(model.norm, keep)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "reference"),
    [("resnet18", compact_resnet), ("vit_small", compact_vit), ("deit_small", compact_vit)],
)
def test_compact_is_the_model_without_the_channels(name: str, reference: Any) -> None:
    model = small(name)
    masks = random_masks(model, 0.6)
    module = decompose(model, masks, [3, 0], mode="compact")
    exact = decompose(model, masks, [3, 0])
    assert module.report["parameters"] < exact.report["parameters"]
    assert module.certificate["deviation"] > 0
    assert module.certificate["dropped"]
    expected = masked_logits(reference(model, masks), masks, IMAGES)[:, [3, 0]]
    with torch.no_grad():
        actual = module(IMAGES).double()
    assert (actual - expected).abs().max() < 1e-4 * expected.std()


def test_models_without_residual_streams_stay_exact() -> None:
    model = small("vgg16")
    masks = random_masks(model, 0.6)
    module = decompose(model, masks, mode="compact")
    assert module.certificate["dropped"] == {}
    assert module.certificate["deviation"] == 0
