"""Image files become what a viewer would show."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nemo.data import DataError
from nemo.data.images import ImageFile, ImageFiles


def decode(path: Path, size: tuple[int, int] | None = None, grey: bool = False) -> np.ndarray:
    """One image as (H, W, C)."""
    file = ImageFile(path)
    return ImageFiles([file], size, file, grey).decode()[0].transpose(1, 2, 0)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """(H, W, 3 or 4) of uint16, by hand: Pillow writes 8 bits only."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width, channels = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_images_lie_on_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([0, 0, 0, 10, 20, 30])
        image.putdata([0, 1])
        image.save(path, transparency=0)
        expected = [[255, 255, 255], [10, 20, 30]]
    elif mode == "RGB":  # one colour stands for nothing
        image = Image.new("RGB", (2, 1))
        image.putpixel((1, 0), (10, 20, 30))
        image.save(path, transparency=(0, 0, 0))
        expected = [[255, 255, 255], [10, 20, 30]]
    elif mode == "LA":
        image = Image.new("LA", (2, 1), (0, 0))
        image.putpixel((1, 0), (100, 51))  # a fifth of it
        image.save(path)
        expected = [[255] * 3, [224] * 3]  # 100 / 5 + 255 * 4 / 5
    else:
        image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
        image.putpixel((1, 0), (100, 200, 0, 51))
        image.putpixel((2, 0), (1, 2, 3, 255))
        image.save(path)
        expected = [[255] * 3, [224, 244, 204], [1, 2, 3]]
    assert decode(path)[0].tolist() == expected


@pytest.mark.parametrize("channels", [3, 4])
def test_images_of_16_bits_are_refused(tmp_path: Path, channels: int) -> None:
    path = tmp_path / "deep.png"
    write_png(path, np.full((4, 4, channels), 1020))
    with pytest.raises(DataError, match=r"deep\.png: more than 8 bits a channel; accepted: 8-bit"):
        decode(path)


UPRIGHT = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
STORED = {  # by EXIF: where the first row and the first column of the file belong
    1: UPRIGHT,  # top, left
    2: UPRIGHT[:, ::-1],  # top, right
    3: UPRIGHT[::-1, ::-1],  # bottom, right
    4: UPRIGHT[::-1],  # bottom, left
    5: UPRIGHT.transpose(1, 0, 2),  # left, top
    6: UPRIGHT.transpose(1, 0, 2)[::-1],  # right, top
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: UPRIGHT.transpose(1, 0, 2)[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
def test_the_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(path, exif=exif)
    assert np.array_equal(decode(path), UPRIGHT)


def test_a_turned_jpeg_is_decoded_small_and_fitted_upright(tmp_path: Path) -> None:
    upright = np.zeros((400, 800, 3), dtype=np.uint8)
    upright[:, 400:] = 240
    exif = Image.Exif()
    exif[274] = 6
    stored = np.ascontiguousarray(upright.transpose(1, 0, 2)[::-1])
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif)
    found = decode(tmp_path / "a.jpg", (20, 40))
    assert found.shape == (20, 40, 3)
    assert found[:, :18].max() < 4
    assert found[:, 22:].min() > 236


def test_an_oblong_is_the_largest_centred_part_in_proportion(tmp_path: Path) -> None:
    wide = np.tile(np.arange(120, dtype=np.uint8)[None, :, None], (20, 1, 3))
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert np.array_equal(decode(tmp_path / "a.png", (20, 60)), wide[:, 30:90])
    assert np.array_equal(decode(tmp_path / "a.png", (20, 120)), wide)


def test_grey_is_luminance(tmp_path: Path) -> None:
    Image.fromarray(np.uint8([[[100, 100, 100], [255, 0, 0], [0, 255, 0]]])).save(
        tmp_path / "a.png"
    )
    assert decode(tmp_path / "a.png", grey=True)[0].tolist() == [[100], [76], [150]]
