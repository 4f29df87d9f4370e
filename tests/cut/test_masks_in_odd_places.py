"""Networks in which a mask is not the same as zero weights: computed, shared, read twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import nemo
from nemo.module.check import logits_of
from tests.cut.helpers import randomise
from tests.oracles.masked import masked_logits, modular_logits

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(9))


class Plain(nn.Module):
    input_size = (3, 12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(torch.relu(self.stem(x))))
        return self.fc(torch.relu(self.b(x)).mean((2, 3)))


def tied() -> nn.Module:
    model = Plain()
    model.b.weight = model.a.weight
    return model


def computed(compute: Callable[[Any], object]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = Plain()
        compute(model.a)
        compute(model.b)
        return model

    return build


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias, padding=1)


def standardised() -> nn.Module:
    model = Plain()
    model.a, model.b = Standardised(8, 8, 3), Standardised(8, 8, 3)
    return model


class PreActivation(nn.Module):
    """The skip path reads the convolution, not its norm."""

    input_size = (3, 12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.b = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(torch.relu(self.stem(x)))
        x = x + self.b(torch.relu(self.norm(x)))
        return self.fc(torch.relu(x).mean((2, 3)))


class OneNorm(nn.Module):
    """One BatchNorm for three convolutions and what lies between them."""

    input_size = (3, 12, 12)

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=affine)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        y = self.a(x)
        z = self.b(torch.tanh(x))  # runs before the norm reads y
        x = torch.relu(self.bn(y)) + self.bn(torch.sigmoid(x)) + torch.relu(self.bn(z))
        return self.fc(x.mean((2, 3)))


class Mirrored(nn.Module):
    """Each image and its mirror image are one batch, whose halves meet again."""

    input_size = (3, 12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[0]
        x = torch.relu(self.a(torch.relu(self.stem(torch.cat([x, x.flip(3)])))))
        x = torch.relu(self.b(x)).mean((2, 3))
        return self.fc(x[:count] + x[count:].sigmoid())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "tied": tied,
    "weight_norm": computed(parametrizations.weight_norm),
    "weight_norm of old": computed(nn.utils.weight_norm),
    "spectral_norm": computed(parametrizations.spectral_norm),
    "pruned": computed(lambda m: prune.random_unstructured(m, "weight", amount=0.3)),
    "standardised": standardised,
    "pre-activation": PreActivation,
    "one norm": OneNorm,
    "halves of the batch": Mirrored,
    "one norm without weights": lambda: OneNorm(affine=False),
}
MASKS = {"a": torch.arange(8) % 2 == 0, "b": torch.arange(8) < 4}


@pytest.fixture(params=MODELS)
def modular(request: pytest.FixtureRequest) -> nemo.Modular:
    torch.manual_seed(0)
    made = nemo.modularize(randomise(MODELS[request.param]()).double()).eval()
    torch.nn.functional.mse_loss(made(IMAGES.double())[0], torch.ones(4, 4)).backward()
    return made


def error(actual: Tensor, expected: Tensor) -> float:
    assert expected.std() > 1e-3
    return float((actual - expected).abs().max() / expected.std())


def test_the_module_computes_what_the_modular_model_does(modular: nemo.Modular) -> None:
    assert modular.layers == {"a": 8, "b": 8}
    x = IMAGES.double()
    expected = modular_logits(modular, MASKS, x)
    assert error(masked_logits(modular.model, MASKS, x), expected) < 1e-12  # two oracles
    module = nemo.decompose(modular, MASKS)
    with torch.no_grad():
        assert error(module(x), expected) < 1e-12
        assert error(modular.under(MASKS)(x), expected) < 1e-12
        assert error(nemo.decompose(modular.model, MASKS)(x), expected) < 1e-12
    whole = isinstance(modular.model, PreActivation)  # its skip path reads all of `a`
    assert module.report["parameters"] < (1050 if whole else 900)  # of about 1440


def test_the_proof_expects_what_the_modular_model_computes(modular: nemo.Modular) -> None:
    takes, masked = modular.takes, modular.under(MASKS).in_double()
    ours = logits_of(partial(takes.run, masked), takes, [2, 0])
    draw = torch.Generator().manual_seed(20250805)
    images = torch.randn(4, 3, 12, 12, generator=draw, dtype=torch.float64)
    assert error(ours, modular_logits(modular, MASKS, images)[:, [2, 0]]) < 1e-12


def test_a_slope_for_each_channel_is_cut_with_its_channel() -> None:
    class Sloped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(8, 4)
            self.slope, self.c = nn.PReLU(12), nn.Conv2d(12, 8, 3)
            nn.init.normal_(self.slope.weight)

        def forward(self, x: Tensor) -> Tensor:
            x = self.slope(self.b(torch.relu(self.a(x))))
            return self.fc(self.c(x).mean((2, 3)))

    torch.manual_seed(0)
    images = torch.randn(3, 3, 16, 16)
    modular = nemo.modularize(Sloped().eval(), example=images)
    masks = {"b": torch.arange(12) % 2 == 0, "c": torch.arange(8) < 5}
    module = nemo.decompose(modular, masks)
    assert module.get_parameter("b.weight").shape[0] == 6
    expected = modular_logits(modular, masks, images)
    assert error(module.double()(images.double()), expected) < 1e-9
