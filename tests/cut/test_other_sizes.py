"""Inputs of another size than a module was cut for: right, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nemo
from tests.cut.helpers import random_masks, randomise
from tests.oracles.masked import masked_logits

REFUSED = r"\(3, 24, 24\), and this module was cut for \(3, 16, 16\)"


class Net(nn.Module):
    """Two convolutions and a head; how they are pooled is each test's own."""

    input_size = (3, 16, 16)

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(3, 6, 3, 2, padding=1)
        self.conv = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = self.conv(self.stem(x).relu()).relu()
        if self.how == "divided":
            return self.head(x.sum((2, 3)) / (height * width))
        if self.how == "same padding":  # as TensorFlow pads: by the size modulo the stride
            x = F.pad(x, (0, width % 4, 0, height % 4), value=9.0)
        if self.how == "resized":
            x = F.interpolate(x, size=(height, width), mode="bilinear")
        return self.head(x.amax((2, 3)))


def cut(how: str) -> tuple[nn.Module, dict[str, Tensor], nemo.DecomposedModule]:
    model = randomise(Net(how))
    masks = random_masks(model, 0.6)
    return model, masks, nemo.decompose(model, masks)


@pytest.mark.parametrize("how", ["divided", "same padding", "resized"])
def test_a_network_that_computes_with_the_size_is_for_one_size(how: str, tmp_path: Path) -> None:
    model, masks, module = cut(how)
    assert module.certificate["fixed_size"]
    nemo.save(module, tmp_path)
    for one in (module, nemo.load(tmp_path), module.optimize_for_inference()):
        images = torch.randn(2, 3, 16, 16)
        expected = masked_logits(model, masks, images)
        torch.testing.assert_close(one(images).double(), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match=REFUSED):
            one(torch.zeros(2, 3, 24, 24))


@pytest.mark.parametrize("size", [(16, 16), (24, 24), (37, 29), (9, 50)])
def test_a_network_that_only_convolves_and_pools_takes_any_size(size, tmp_path) -> None:
    model, masks, module = cut("largest")
    assert not module.certificate["fixed_size"]
    nemo.save(module, tmp_path)
    images = torch.randn(2, 3, *size)
    expected = masked_logits(model, masks, images)
    for one in (module, nemo.load(tmp_path), module.optimize_for_inference()):
        torch.testing.assert_close(one(images).double(), expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_known_to_hold_elsewhere_is_for_one_size(tmp_path) -> None:
    """A module of 0.1 does not say; of a compact one or a Transformer nothing is proved."""
    old = nemo.load(Path(__file__).parents[1] / "module/saved-by-0.1")
    compact = nemo.decompose(*cut("largest")[:2], mode="compact")
    vit = timm.create_model("test_vit", img_size=32, num_classes=4, dynamic_img_size=True)
    vit = randomise(vit)
    dynamic = nemo.decompose(vit, random_masks(vit, 0.6), example=torch.zeros(2, 3, 32, 32))
    for module in (old, compact, dynamic):
        channels, height, width = module.input_size
        module(torch.zeros(2, *module.input_size))
        with pytest.raises(ValueError, match="this module was cut for"):
            module(torch.zeros(2, channels, height + 32, width + 32))


def test_a_merged_module_takes_the_sizes_that_both_parts_take() -> None:
    for how, fixed in (("largest", False), ("divided", True)):
        model, masks, _ = cut("largest")
        other, others, _ = cut(how)
        parts = nemo.decompose(model, masks, [0, 1]), nemo.decompose(other, others, [2, 3])
        merged = nemo.merge(*parts, [(torch.randn(8, 3, 16, 16), torch.arange(8) % 4)])
        assert merged.certificate["fixed_size"] is fixed
