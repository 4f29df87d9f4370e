"""Images as uint8 arrays in one size (ours).

N images, C channels (3: RGB, 1: grey), H x W pixels. An image is taken as it is shown: turned by
its EXIF orientation, and on white where it is transparent.
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
    """Images (N, C, H, W) in their files, decoded when needed and fitted to `size` if given."""

    files: Sequence[ImageFile]
    size: tuple[int, int] | None  # (H, W)
    like: ImageFile  # the image whose size all others must have
    grey: bool = False

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: slice | Labels) -> ImageFiles:
        return replace(self, files=[self.files[row] for row in np.arange(len(self))[rows]])

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        with _named_when_unreadable(self.like):
            return (len(self), *_decode(self.like, self.size, self.grey).shape)

    def decode(self) -> Pixels:
        """All of them, (N, C, H, W), in order.

        Raises:
            DataError: a file cannot be read or decoded, or differs in size from `like`.
        """
        pixels = np.empty(self.shape, dtype=np.uint8)

        def place(index: int) -> tuple[int, int]:
            image = _decode(self.files[index], self.size, self.grey)
            if image.shape == self.shape[1:]:
                pixels[index] = image
            return image.shape[1:]

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


def _decode(file: ImageFile, size: tuple[int, int] | None, grey: bool) -> Pixels:
    """One image as (C, H, W)."""
    from PIL import Image as Pillow
    from PIL import ImageOps, UnidentifiedImageError

    data = file.read()
    try:
        with Pillow.open(io.BytesIO(data)) as image:
            deep = _is_deep(image)
            if size is not None:
                # lets JPEG decode at a half, quarter or eighth, still twice what `fit` needs
                image.draft(None, (2 * max(size), 2 * max(size)))
            ImageOps.exif_transpose(image, in_place=True)
            shown = fit(_on_white(image), size)
            pixels = np.asarray(shown.convert("L"))[None] if grey else np.asarray(shown)
    except UnidentifiedImageError:
        raise DataError(f"{file}: damaged, or in no image format that Pillow reads") from None
    except Exception as error:  # whatever a decoder makes of damaged bytes
        raise DataError(f"{file}: cannot be decoded ({' '.join(str(error).split())})") from None
    if deep:
        raise DataError(f"{file}: more than 8 bits a channel; accepted: 8-bit images")
    return pixels if grey else pixels.transpose(2, 0, 1)


def _is_deep(image: Image) -> bool:
    """Whether it has more than 8 bits a channel; of colours, Pillow would drop the lower ones."""
    stored = " ".join(str(tile[3]) for tile in getattr(image, "tile", ()))
    return image.mode.startswith(DEEP_MODES) or ";16" in stored


def _on_white(image: Image) -> Image:
    """As RGB. Below what is transparent, files hold any colour, mostly black."""
    from PIL import Image as Pillow

    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Pillow.new("RGBA", image.size, "white")
    return Pillow.alpha_composite(white, image).convert("RGB")


def fit(image: Image, size: tuple[int, int] | None) -> Image:
    """The largest centred part that is in proportion to `size` (H, W), resized to it (bilinear)."""
    from PIL import Image as Pillow
    from PIL import ImageOps

    if size is None or image.size == size[::-1]:
        return image
    return ImageOps.fit(image, size[::-1], method=Pillow.Resampling.BILINEAR)


def fit_all(images: npt.NDArray[Any], size: int | None) -> Pixels:
    """`fit` for arrays: (N, H, W, 3) uint8 to (N, 3, H, W), squares where `size` says so."""
    from PIL import Image as Pillow

    if size is not None and images.shape[1:3] != (size, size):
        square = (size, size)
        images = np.stack([np.asarray(fit(Pillow.fromarray(image), square)) for image in images])
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
