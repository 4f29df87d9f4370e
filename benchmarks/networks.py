"""The networks of `benchmarks.coverage`: timm's, torchvision's, Hugging Face's, and some written by
hand here.

A name is timm's own, `torchvision/NAME`, `hf/NAME` or `own/NAME`. All have 10 classes and random
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from benchmarks import hugging_face

Inputs = Tensor | dict[str, Tensor]
Draw = Callable[[int, int], Inputs]  # a batch, from its size and a seed
SIZES = (64, 96, 128, 224, 240, 256, 299)
CLASSES = 10


def build(name: str) -> tuple[nn.Module, Draw]:
    """The model at the smallest image size that it takes, and what draws a batch of its inputs."""
    library, _, own = name.partition("/")
    torch.manual_seed(0)
    if library == "hf":
        of_classes, draw = hugging_face.MODELS[own]
        return of_classes(CLASSES).eval(), draw
    if library == "own":
        make, shape = OWN[own]
        return make().eval(), partial(_images, shape)
    failure: Exception | None = None
    for size in SIZES:
        for arguments in ({"img_size": size}, {"image_size": size}, {}):
            try:
                torch.manual_seed(0)
                model = _create(name, arguments)
                images = torch.randn(2, 3, size, size)
                with torch.no_grad():
                    model.train()(torch.cat([images, images]))  # some have more layers then
                    model.eval()(images)
                return model, partial(_images, (3, size, size))
            except (TypeError, RuntimeError, AssertionError, ValueError, IndexError) as error:
                failure = error
    raise RuntimeError(f"no image size works: {failure}")


def _images(shape: tuple[int, ...], batch: int, seed: int) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def _create(name: str, arguments: dict[str, Any]) -> nn.Module:
    library, _, model = name.rpartition("/")
    if library == "torchvision":
        from torchvision.models import get_model

        return get_model(model, weights=None, num_classes=CLASSES, **arguments)
    import timm

    return timm.create_model(name, num_classes=CLASSES, **arguments)


class Plain(nn.Module):
    """Three convolutions and a classifier; `change` edits it."""

    def __init__(self, change: Callable[[Any], object]) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 32, 3, 2), nn.Linear(32, CLASSES)
        self.a, self.b = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        change(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(torch.relu(self.stem(x)))))
        return self.fc(torch.relu(x).mean((2, 3)))


def _normed(net: Any) -> None:
    weight_norm(net.a)
    weight_norm(net.b)


def _tied(net: Any) -> None:
    net.b.weight = net.a.weight


class PreActivation(nn.Module):
    """A convolution that its norm reads, and the skip path past it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 32, 3, 2), nn.Conv2d(32, 32, 3, padding=1)
        self.norm, self.body = nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(torch.relu(self.stem(x)))
        return self.fc(torch.relu(x + self.body(torch.relu(self.norm(x)))).mean((2, 3)))


class OneNorm(nn.Module):
    """The same BatchNorm after every convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.fc = nn.Conv2d(3, 32, 3, 2), nn.BatchNorm2d(32), nn.Linear(32, 10)
        self.a, self.b = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.stem, self.a, self.b):
            x = torch.relu(self.bn(conv(x)))
        return self.fc(x.mean((2, 3)))


class Autoencoding(nn.Module):
    """Down and up again, with a skip path, and a classifier on top."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 32, 4, 2, 1), nn.Conv2d(32, 64, 4, 2, 1)
        self.up, self.out = nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.Conv2d(64, 32, 3, padding=1)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.down1(x))
        y = torch.relu(self.up(torch.relu(self.down2(x))))
        return self.fc(torch.relu(self.out(torch.cat([x, y], 1))).mean((2, 3)))


class Tokens(nn.Module):
    """torch's own Transformer, on patches, tokens first or samples first; or a GRU."""

    def __init__(self, batch_first: bool, recurrent: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 32, 8, 8), nn.Linear(32, CLASSES)
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=batch_first)
        self.body: nn.Module = (
            nn.GRU(32, 32, batch_first=True)
            if recurrent
            else nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        )
        self.batch_first, self.recurrent = batch_first, recurrent

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = self.body(x if self.batch_first else x.transpose(0, 1))
        x = x[0] if self.recurrent else x
        return self.head(x.mean(1 if self.batch_first else 0))


def _mlp() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(300, 64), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, CLASSES))


def _signal() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in (3, 32, 32):
        layers += [nn.Conv1d(inputs, 32, 5, 2), nn.BatchNorm1d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, CLASSES))


def _all_convolutional() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in (3, 32, 32):
        layers += [nn.Conv2d(inputs, 32, 3, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(32, CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


IMAGE = (3, 32, 32)
OWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "weight_norm": (lambda: Plain(_normed), IMAGE),
    "tied": (lambda: Plain(_tied), IMAGE),
    "preactivation": (PreActivation, IMAGE),
    "one_norm": (OneNorm, IMAGE),
    "autoencoding": (Autoencoding, IMAGE),
    "tokens_first": (lambda: Tokens(batch_first=False), IMAGE),
    "gru": (lambda: Tokens(batch_first=True, recurrent=True), IMAGE),
    "mlp": (_mlp, (3, 10, 10)),
    "signal": (_signal, (3, 128)),
    "all_convolutional": (_all_convolutional, IMAGE),
}
