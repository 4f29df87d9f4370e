"""What users can get wrong, and what the self-check catches."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import nemo
from nemo.cut import ExactnessError, decompose, decomposer
from nemo.cut.builder import Builder
from nemo.masking.class_masks import ClassMasks
from nemo.models import build_model
from nemo.models.shapes import CnnShape
from tests.cut.helpers import random_masks, randomise


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomise(build_model("resnet18", 4, 32, CnnShape(width=0.125)))


def test_unknown_mode_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="mode must be one of exact, compact"):
        decompose(model, {}, mode="fast")


def test_class_masks_are_not_the_masks_of_a_module(model: nn.Module) -> None:
    modular = nemo.modularize(model, example=torch.zeros(1, 3, 32, 32))
    masks = {layer: torch.ones(10, count) > 0 for layer, count in modular.layers.items()}
    with pytest.raises(
        ValueError, match=r"one dimension, got .*: class_masks\.select\(\[3, 5\]\)$"
    ):
        decompose(modular, ClassMasks(masks, {}))


def test_models_must_return_one_tensor() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.conv(x), x

    with pytest.raises(ValueError, match="returns several tensors; name one: output=0, 1"):
        decompose(Pair(), {})


def test_a_wrong_module_is_caught_with_the_layer(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite = decomposer.rewrite

    def wrong(*args: Any) -> Builder:
        build = rewrite(*args)
        name = next(name for name in build.layers if name.endswith("1_0_conv2"))
        build.layers[name].tensors["weight"][0] += 1e-3
        return build

    monkeypatch.setattr(decomposer, "rewrite", wrong)
    with pytest.raises(ExactnessError, match=r"starts at stages\.1\.0\.conv2"):
        decompose(model, random_masks(model, 0.5))


@pytest.mark.parametrize("mode", ["exact", "compact"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_blamed_on_the_cut(mode: str, value: float) -> None:
    head = nn.Linear(96, 3)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Flatten(), head)
    modular = nemo.modularize(model, example=torch.zeros(2, 1, 8, 8))
    head.weight.data[1, 2] = value  # as by a training that diverged
    masks = {"1": torch.arange(6) < 3}
    with pytest.raises(ValueError, match=r"^the model's logits are not finite: are its weights\?$"):
        decompose(modular, masks, mode=mode)
    assert decompose(modular, masks, [0, 2], mode=mode).certificate["error"] < 1e-9


NO_EXAMPLE = r"not run on images of 3 x 32 x 32 \(tried, as there is no example=\): .* but got 3"


def test_the_size_of_images_is_that_of_modularize():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 3))
    modular = nemo.modularize(model, example=torch.zeros(1, 1, 8, 8))
    mask = torch.tensor([True, False] * 3)
    module = decompose(modular, {"1": mask})  # found, though 3 x 32 x 32 does not fit
    assert module(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    with pytest.raises(ValueError, match=NO_EXAMPLE):
        decompose(model, {"1": mask})
    with pytest.raises(ValueError, match=NO_EXAMPLE):
        nemo.modularize(model)


FIRST_CUT = """
import torch, nemo
net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3))
nemo.decompose(net, {"0": torch.arange(4) < 2})
"""


def test_the_first_cut_of_a_process_warns_of_nothing():
    command = [sys.executable, "-W", "error::FutureWarning", "-c", FIRST_CUT]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.stderr == ""


def test_images_of_another_size_are_refused_where_constants_know_theirs(model: nn.Module) -> None:
    module = decompose(model, random_masks(model, 0.1))
    assert module(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    with pytest.raises(ValueError, match=r"\(3, 48, 48\), and this module was cut for \(3, 32, 32"):
        module(torch.randn(2, 3, 48, 48))


def test_images_of_another_size_are_taken_where_nothing_depends_on_it(model: nn.Module) -> None:
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(
        decompose(model, random_masks(model, 1))(images), model.eval()(images)
    )


def test_channels_of_a_channels_last_map_are_no_positions() -> None:
    network = randomise(timm.create_model("convnext_atto", num_classes=4))
    masks, images = random_masks(network, 0.5), torch.randn(2, 3, 96, 96)
    module = decompose(network, masks, example=torch.randn(1, 3, 64, 64))
    expected = decompose(network, masks, example=images)(images)
    torch.testing.assert_close(module(images), expected)
