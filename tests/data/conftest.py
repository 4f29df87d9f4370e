"""Small image folders, made as the tests ask for them."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[..., Path]:
    """`make_images("photos", {"train/cat": 5}, size=(8, 8))`: PNGs of noise, 5 in train/cat."""

    def make(name: str, counts: dict[str, int], size: tuple[int, int] = (8, 8)) -> Path:
        random = np.random.default_rng(0)
        for folder, count in counts.items():
            (tmp_path / name / folder).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / folder / f"{index:04}.png")
        return tmp_path / name

    return make


@pytest.fixture
def make_tar() -> Callable[[Path, Path], Path]:
    """`make_tar(folder, tar)`: what is in `folder`, in `tar`."""

    def make(folder: Path, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for child in sorted(folder.iterdir(), reverse=True):
                tar.add(child, child.name)
        return path

    return make
