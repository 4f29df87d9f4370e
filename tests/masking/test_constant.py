import pytest
import torch
from torch import nn

from nemo import class_masks, decompose, modularize
from nemo.data import Prepared, Split
from nemo.masking.constant import mean_scales, scaled
from nemo.models import CnnShape, VitShape, build_model


def test_a_model_scaled_by_binary_masks_is_the_module_that_is_cut():
    torch.manual_seed(0)
    modular = modularize(build_model("resnet18", 4, 32, CnnShape(width=0.25))).eval()
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
    masks = class_masks(modular, [(images, labels)], threshold=0.5).select([1, 3])
    whole = scaled(modular, {layer: mask.float() for layer, mask in masks.items()})
    module = decompose(modular, masks)
    torch.testing.assert_close(whole(images)[:, [1, 3]], module(images), atol=1e-4, rtol=1e-4)


def test_neurons_of_computed_weights_are_not_scaled_in_them():
    torch.manual_seed(0)
    modular = modularize(build_model("timm/nf_resnet26", 4, 32))
    for parameter in modular.model.parameters():  # a block's last gain starts at zero
        if parameter.numel() == 1:
            parameter.data.fill_(1)
    half = {layer: torch.full((neurons,), 0.5) for layer, neurons in modular.layers.items()}
    with pytest.raises(ValueError, match="weights are computed, shared or absent"):
        scaled(modular, half)


def test_mean_scales_are_the_average_mask_over_all_images():
    torch.manual_seed(0)
    shape = VitShape(dim=16, depth=2, heads=2, patch=4)
    modular = modularize(build_model("vit_small", 4, 8, shape)).eval()
    train = Split(torch.randint(0, 256, (300, 3, 8, 8), dtype=torch.uint8), torch.arange(300) % 4)
    data = Prepared(
        name="noise", title="", classes=("a", "b", "c", "d"), size=(8, 8), mean=(0.5,) * 3,
        std=(0.25,) * 3, flip=False, crop=0, sha256="", splits={"train": train},
    )  # fmt: skip
    found = mean_scales(modular, data)
    with torch.no_grad():
        _, masks = modular((train.images / 255 - 0.5) / 0.25)
    assert found.keys() == modular.layers.keys()
    for layer, mask in masks.items():
        torch.testing.assert_close(found[layer], mask.mean(0), atol=1e-5, rtol=1e-5)


def test_a_batchnorm_without_weights_cannot_be_scaled_in_them():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, affine=False)
    layers = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), norm, nn.ReLU(), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(64, 2))
    modular = modularize(model, example=torch.randn(2, 3, 8, 8))
    half = {layer: torch.full((neurons,), 0.5) for layer, neurons in modular.layers.items()}
    with pytest.raises(ValueError, match="weights are computed, shared or absent: neurons"):
        scaled(modular, half)
