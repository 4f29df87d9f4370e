"""The paper's four CNNs for 32 x 32 images. `width` scales every layer's channels.

SimCNN and ResCNN have BatchNorm here in the standard and the modular model alike; in the authors'
code only the modular ones do, which confounds their comparison.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from nemo.models.registry import model
from nemo.models.shapes import CnnShape

POOL = "pool"
# 13 convolutions in five groups, each followed by a 2 x 2 max-pool
PLAIN: list[int | str] = [64, 64, POOL, 128, 128, POOL, *[256] * 3, POOL]
PLAIN += [*[512] * 3, POOL] * 2


def _scale(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _conv_bn(in_channels: int, out_channels: int) -> list[nn.Module]:
    # the bias means nothing before BatchNorm; it is there so that parameter counts are the paper's
    return [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels)]


class PlainCnn(nn.Module):
    """VGG16 and SimCNN: the same convolutions; dropout comes after the hidden layers, or before."""

    def __init__(self, num_classes: int, image_size: int, width: float, after: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for step in PLAIN:
            if isinstance(step, str):
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            else:
                layers += [*_conv_bn(channels, _scale(step, width)), nn.ReLU()]
                channels = _scale(step, width)
        self.features = nn.Sequential(*layers)
        hidden, layers = _scale(512, width), []
        for inputs in (_flat_features(channels, image_size, 5), hidden):
            layer = [nn.Linear(inputs, hidden), nn.ReLU()]
            layers += [*layer, nn.Dropout()] if after else [nn.Dropout(), *layer]
        self.classifier = nn.Sequential(*layers, nn.Linear(hidden, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(self.features(images).flatten(1)))


def _flat_features(channels: int, image_size: int, halvings: int) -> int:
    for _ in range(halvings):
        image_size = (image_size + 1) // 2
    return channels * image_size**2


def _width(shape: CnnShape | None) -> float:
    return 1.0 if shape is None else shape.width


@model("vgg16", "cnn", CnnShape)
def vgg16(num_classes: int, image_size: int, shape: CnnShape | None) -> nn.Module:
    made = PlainCnn(num_classes, image_size, _width(shape), after=True)
    for module in made.classifier:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    return made


@model("simcnn", "cnn", CnnShape)
def simcnn(num_classes: int, image_size: int, shape: CnnShape | None) -> nn.Module:
    return PlainCnn(num_classes, image_size, _width(shape), after=False)


class ResCnn(nn.Module):
    """Twelve convolutions, three skips: each adds the tensor it remembers, with no projection."""

    def __init__(self, num_classes: int, image_size: int, width: float) -> None:
        super().__init__()
        plan = [_scale(c, width) for c in (64, 128, 128, 128, 256, *[512] * 7)]
        inputs = [3, *plan[:-1]]
        self.convs = nn.ModuleList(
            nn.Sequential(*_conv_bn(i, o), nn.ReLU()) for i, o in zip(inputs, plan, strict=True)
        )
        self.dropout = nn.Dropout()
        self.classifier = nn.Linear(_flat_features(plan[-1], image_size, 5), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        c = self.convs
        x = _halve(c[1](c[0](images)))
        x = c[3](c[2](x)) + x
        x = _halve(c[5](_halve(c[4](x))))
        x = c[7](c[6](x)) + x
        x = _halve(c[9](_halve(c[8](x))))
        x = c[11](c[10](x)) + x
        return cast(Tensor, self.classifier(self.dropout(x.flatten(1))))


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2, ceil_mode=True)


@model("rescnn", "cnn", CnnShape)
def rescnn(num_classes: int, image_size: int, shape: CnnShape | None) -> nn.Module:
    return ResCnn(num_classes, image_size, _width(shape))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a skip, with a 1 x 1 convolution where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet18(nn.Module):
    """ResNet18 with the CIFAR stem: a 3 x 3 convolution and no max-pool."""

    def __init__(self, num_classes: int, width: float) -> None:
        super().__init__()
        plan = [_scale(c, width) for c in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, plan[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(plan[0])
        stages: list[nn.Module] = []
        channels = plan[0]
        for i, out in enumerate(plan):
            stages.append(
                nn.Sequential(
                    BasicBlock(channels, out, 1 if i == 0 else 2), BasicBlock(out, out, 1)
                )
            )
            channels = out
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stages(F.relu(self.bn1(self.conv1(images))))
        return cast(Tensor, self.fc(x.mean((2, 3))))


@model("resnet18", "cnn", CnnShape)
def resnet18(num_classes: int, image_size: int, shape: Any) -> nn.Module:
    return ResNet18(num_classes, _width(shape))
