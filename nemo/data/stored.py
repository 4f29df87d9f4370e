"""Arrays that need not fit into memory: written in chunks, and read by the batch (ours).

The file is what safetensors writes, byte for byte. N images, 3 channels, H x W pixels.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from nemo.data.errors import DataError
from nemo.data.images import Labels, RawSplit, chunks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHUNK = 2**24  # bytes of pixels that are decoded and counted at once


def write_arrays(path: Path, splits: Mapping[str, RawSplit]) -> Labels:
    """Write SPLIT.labels and SPLIT.images of every split, holding few images at a time.

    Returns:
        How often each value occurs in the training images, by channel: (3, 256) int64.

    Raises:
        DataError: an image cannot be decoded.
    """
    counts = np.zeros((3, 256), dtype=np.int64)
    with path.open("wb") as file:
        file.write(_header(splits))
        for name in sorted(splits):
            file.write(splits[name].labels.astype("<i8").tobytes())
        for name in sorted(splits):
            images = splits[name].images
            for pixels in chunks(images, max(1, CHUNK // math.prod(images.shape[1:]))):
                file.write(pixels.data)
                if name == "train":
                    for channel in range(3):
                        counts[channel] += np.bincount(pixels[:, channel].ravel(), minlength=256)
    return counts


def _header(splits: Mapping[str, RawSplit]) -> bytes:
    """Length and JSON, in safetensors' order: the widest numbers first, then by name."""
    entries, end = {}, 0
    for what, dtype, width in (("labels", "I64", 8), ("images", "U8", 1)):
        for name in sorted(splits):
            shape = getattr(splits[name], what).shape
            start, end = end, end + math.prod(shape) * width
            entries[f"{name}.{what}"] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [start, end],
            }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class StoredImages:
    """Images that stay in their file. Indexing reads those asked for: (B, 3, H, W) uint8."""

    path: Path
    start: int  # byte at which the first image of the array begins
    size: tuple[int, int, int]  # 3, H, W
    rows: Tensor  # (N,) positions in the array
    stamp: tuple[int, int]  # tells the file from one that takes its name later
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.size)

    def to(self, device: torch.device | str) -> StoredImages:
        """The same, for batches on `device`."""
        return replace(self, device=device)

    def take(self, rows: Tensor) -> StoredImages:
        """Those images alone; nothing is read."""
        return replace(self, rows=self.rows[rows])

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        import torch

        chosen = self.rows[rows if isinstance(rows, slice) else rows.cpu()].tolist()
        images = torch.empty((len(chosen), *self.size), dtype=torch.uint8)
        length = math.prod(self.size)
        with self.path.open("rb", buffering=0) as file:
            if _stamp(file) != self.stamp:
                raise DataError(f"{self.path}: made anew while in use; run the command again")
            for image, row in zip(images, chosen, strict=True):
                file.seek(self.start + row * length)
                if file.readinto(image.numpy().data) != length:
                    raise DataError(f"{self.path}: cut short while in use; run `nemo prepare`")
        return images.to(self.device)


def stored_images(path: Path, name: str) -> StoredImages:
    """The array `name` of a safetensors file, left where it is.

    Raises:
        OSError, ValueError, KeyError: the file cannot be read, or has no such array.
    """
    import torch

    with path.open("rb") as file:
        stamp = _stamp(file)
        (length,) = struct.unpack("<Q", file.read(8))
        entry: dict[str, Any] = json.loads(file.read(length))[name]
    count, channels, height, width = entry["shape"]
    start = 8 + length + entry["data_offsets"][0]
    return StoredImages(path, start, (channels, height, width), torch.arange(count), stamp)


def _stamp(file: BinaryIO) -> tuple[int, int]:
    about = os.fstat(file.fileno())
    return about.st_dev, about.st_ino
