"""Images as uint8 arrays in one size (ours).

N images, 3 channels (RGB), H x W pixels.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nemo.data.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
DEEP_MODES = ("I", "F")  # Pillow's prefixes of modes with more than 8 bits a channel


@dataclass(frozen=True)
class RawSplit:
    """One split as its source has it: images (N, 3, H, W) uint8, labels (N,) int64."""

    images: Pixels | ImageFiles
    labels: Labels


@dataclass(frozen=True)
class RawSplits:
    """A decoded source: `train`, and `val` and `test` where the source has them."""

    title: str
    classes: list[str]
    splits: dict[str, RawSplit]


@dataclass(frozen=True)
class ImageFile:
    """A file, or the bytes of a member inside a .tar."""

    path: Path
    member: str | None = None
    offset: int = 0
    size: int = -1

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}: {self.member}"

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class ImageFiles:
    """Images (N, 3, H, W) in their files, decoded when needed and fitted to `size` if given."""

    files: Sequence[ImageFile]
    size: int | None
    like: ImageFile  # the image whose size all others must have

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: slice | Labels) -> ImageFiles:
        return replace(self, files=[self.files[row] for row in np.arange(len(self))[rows]])

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        with _named_when_unreadable(self.like):
            height, width, channels = _decode(self.like, self.size).shape
        return (len(self), channels, height, width)

    def decode(self) -> Pixels:
        """All of them, (N, 3, H, W), in order.

        Raises:
            DataError: a file cannot be read or decoded, or differs in size from `like`.
        """
        pixels = np.empty(self.shape, dtype=np.uint8)

        def place(index: int) -> tuple[int, int]:
            image = _decode(self.files[index], self.size)
            if image.shape[:2] == self.shape[2:]:
                pixels[index] = image.transpose(2, 0, 1)
            return image.shape[:2]

        # Pillow decodes outside the GIL
        with _named_when_unreadable(self.like), ThreadPoolExecutor(os.cpu_count()) as pool:
            for file, size in zip(self.files, pool.map(place, range(len(self))), strict=True):
                if size != self.shape[2:]:
                    (h, w), (height, width) = self.shape[2:], size
                    raise DataError(
                        f"images differ in size: {self.like} is {w} x {h}, {file} is {width} x "
                        f"{height}; set the data set's size to resize them"
                    )
        return pixels


def chunks(images: Pixels | ImageFiles, count: int) -> Iterator[Pixels]:
    """The images in their order, `count` at a time, contiguous."""
    for start in range(0, len(images), count):
        part = images[start : start + count]
        yield part.decode() if isinstance(part, ImageFiles) else np.ascontiguousarray(part)


@contextmanager
def _named_when_unreadable(file: ImageFile) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or file}: {error.strerror or error}") from None


def _decode(file: ImageFile, size: int | None) -> Pixels:
    """One image as (H, W, 3)."""
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    data = file.read()
    try:
        with Pillow.open(io.BytesIO(data)) as image:
            if size is not None:
                # lets JPEG decode at a half, quarter or eighth, still twice what `fit` needs
                image.draft(None, (2 * size, 2 * size))
            deep = image.mode.startswith(DEEP_MODES)
            pixels = np.asarray(fit(image.convert("RGB"), size))
    except UnidentifiedImageError:
        raise DataError(f"{file}: damaged, or in no image format that Pillow reads") from None
    except Exception as error:  # whatever a decoder makes of damaged bytes
        raise DataError(f"{file}: cannot be decoded ({' '.join(str(error).split())})") from None
    if deep:
        raise DataError(f"{file}: more than 8 bits a channel; accepted: 8-bit images")
    return pixels


def fit(image: Image, size: int | None) -> Image:
    """The image, its shorter side resized to `size` (bilinear), cut to its centre square."""
    from PIL import Image as Pillow
    from PIL import ImageOps

    if size is None or image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), method=Pillow.Resampling.BILINEAR)


def fit_all(images: npt.NDArray[Any], size: int | None) -> Pixels:
    """`fit` for arrays: (N, H, W, 3) uint8 to (N, 3, H, W), resized where `size` says so."""
    from PIL import Image as Pillow

    if size is not None and images.shape[1:3] != (size, size):
        images = np.stack([np.asarray(fit(Pillow.fromarray(image), size)) for image in images])
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
