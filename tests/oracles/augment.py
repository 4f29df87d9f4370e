"""Crop, flip and normalisation, one pixel at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def augment(image: Tensor, top: int, left: int, mirrored: bool, crop: int) -> Tensor:
    """(3, H, W) uint8: black border of `crop`, H x W cut out at (top, left), then mirrored."""
    channels, height, width = image.shape
    result = torch.zeros_like(image)
    for channel in range(channels):
        for row in range(height):
            for column in range(width):
                target = width - 1 - column if mirrored else column
                y, x = row + top - crop, column + left - crop
                if 0 <= y < height and 0 <= x < width:
                    result[channel, row, target] = image[channel, y, x]
    return result


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(3, H, W) uint8 to float64."""
    channels = [(image[c].double() / 255 - mean[c]) / std[c] for c in range(3)]
    return torch.stack(channels)
