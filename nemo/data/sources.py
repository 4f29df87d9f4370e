"""Where images come from: scikit-learn, torchvision's downloads, or the user's own folder (ours).

Every source ends as `RawSplits`: uint8 images, labels, class names, and the splits it comes with.
scikit-learn, torchvision and Pillow are imported only by the loaders that need them.
"""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nemo.data.errors import DataError
from nemo.data.images import RawSplit, RawSplits, fit_all

DIGITS_SIZE = 16  # without `size`: twice the originals' 8 pixels, enough for two strides or patches
DOWNLOADS = {  # source: title, and the files that torchvision looks for
    "cifar10": ("CIFAR-10", "cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR-100", "cifar-100-python.tar.gz"),
    "svhn": ("SVHN", "train_32x32.mat and test_32x32.mat"),
}
NUMBERS = [str(number) for number in range(10)]
CLASSES = {  # of the sources where they are known beforehand
    "digits": NUMBERS,
    "svhn": NUMBERS,
    "cifar10": [
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    ],
}  # fmt: skip
DOWNLOAD_TIMEOUT = 30.0  # seconds of silence; torchvision itself would wait for ever


def load_source(source: str, size: int | None, downloads: Path) -> RawSplits:
    """Decode `digits`, `cifar10`, `cifar100`, `svhn` or `folder:PATH`.

    Args:
        size: side of the square that every image becomes: its shorter side is resized (bilinear)
            and its centre cropped. None keeps the source's own size (digits: 16).
        downloads: where torchvision's files are, or are downloaded to.

    Raises:
        DataError: the source is unknown, missing, damaged, or not what such a source must be.
    """
    if source.startswith("folder:"):
        from nemo.data.folder import load_folder

        return load_folder(Path(source.removeprefix("folder:")).expanduser(), size)
    if source == "digits":
        return _digits(DIGITS_SIZE if size is None else size)
    if source in DOWNLOADS:
        return _torchvision(source, size, downloads)
    accepted = ", ".join(["digits", *DOWNLOADS, "folder:PATH"])
    raise DataError(f"unknown source {source!r}; accepted: {accepted}")


def _digits(size: int) -> RawSplits:
    """scikit-learn's 1,797 digits, 8 x 8 in 17 greys, as RGB; they come in a single split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = (digits.images * (255 / 16) + 0.5).astype(np.uint8)  # (N, 8, 8), 0..16 to 0..255
    images = fit_all(np.repeat(grey[..., None], 3, axis=3), size)
    split = RawSplit(images, digits.target.astype(np.int64))
    return RawSplits("digits (scikit-learn)", list(NUMBERS), {"train": split})


def _torchvision(source: str, size: int | None, downloads: Path) -> RawSplits:
    """CIFAR-10, CIFAR-100 or SVHN; torchvision checks the files' MD5 before it reads them."""
    from torchvision import datasets

    splits, classes = {}, list(NUMBERS)
    with _one_line_on_failure(source, downloads):
        for split in ("train", "test"):
            if source == "svhn":
                part = datasets.SVHN(str(downloads), split=split, download=True)
                images, labels = part.data.transpose(0, 2, 3, 1), part.labels
            else:
                cifar = datasets.CIFAR10 if source == "cifar10" else datasets.CIFAR100
                part = cifar(str(downloads), train=split == "train", download=True)
                images, labels, classes = part.data, part.targets, list(part.classes)
            splits[split] = RawSplit(fit_all(images, size), np.asarray(labels, dtype=np.int64))
    return RawSplits(DOWNLOADS[source][0], classes, splits)


@contextmanager
def _one_line_on_failure(source: str, downloads: Path) -> Iterator[None]:
    """Turn what a download or a damaged file raises into the line that says what to do."""
    title, files = DOWNLOADS[source]
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{title} cannot be downloaded or read ({reason}); offline, put {files} into "
            f"{downloads}/, or set the source to folder:PATH with an image folder"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
