"""Data sets larger than the cap: the same bytes, the same batches, and little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from nemo.data import Augment, Batches, DataError, load, prepare
from nemo.data.images import RawSplit
from nemo.data.stored import StoredImages, write_arrays
from nemo.sections import DataSource

TINY = 1e-6  # GB: less than any file here


def test_the_file_is_what_safetensors_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo.data.stored.CHUNK", 1000)  # 5 images
    random = np.random.default_rng(0)
    splits = {
        name: RawSplit(
            random.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8), np.arange(count) % 2
        )
        for name, count in (("train", 13), ("val", 1), ("test", 4))
    }
    counts = write_arrays(tmp_path / "arrays", splits)
    arrays = {
        f"{name}.{what}": getattr(split, what)
        for name, split in splits.items()
        for what in ("images", "labels")
    }
    assert (tmp_path / "arrays").read_bytes() == save(arrays)
    by_channel = splits["train"].images.transpose(1, 0, 2, 3).reshape(3, -1)
    assert counts.tolist() == [np.bincount(values, minlength=256).tolist() for values in by_channel]


@pytest.fixture
def pets(make_images: Callable[..., Path], tmp_path: Path) -> Path:
    root = make_images("pets", {"a": 19, "b": 12, "c": 15})
    prepare("pets", DataSource(source=f"folder:{root}"), tmp_path / "prepared")
    return tmp_path / "prepared"


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_from_the_file_are_those_from_memory(pets: Path, shuffle: bool) -> None:
    kept, stored = load(pets), load(pets, TINY)
    assert isinstance(stored.splits["train"].images, StoredImages)
    assert isinstance(load(pets, 1.0).splits["train"].images, torch.Tensor)
    for one, other in ((kept, stored), (kept.restrict([2, 0]), stored.restrict([2, 0]))):
        for name in one.splits:
            assert one.splits[name].images.shape == other.splits[name].images.shape
            batches = [
                Batches(
                    data.splits[name], data.mean, data.std, 4,
                    shuffle=shuffle, augment=Augment(True, 2) if shuffle else None,
                )
                for data in (one, other)
            ]  # fmt: skip
            for (images, labels), (same, too) in zip(*batches, strict=True):
                assert torch.equal(images, same)
                assert torch.equal(labels, too)


def test_a_file_that_is_cut_short_in_use_is_named(pets: Path) -> None:
    stored = load(pets, TINY)
    with (pets / "arrays.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match=r"arrays\.safetensors: cut short while in use"):
        stored.splits["val"].images[:2]


def test_data_that_is_made_anew_in_use_is_named(pets: Path) -> None:
    stored = load(pets, TINY)
    file = pets / "arrays.safetensors"
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    other.replace(file)
    with pytest.raises(DataError, match=r"arrays\.safetensors: made anew while in use"):
        stored.splits["val"].images[:2]


WORK = """
import hashlib, json, sys
from pathlib import Path
import torch
from PIL import Image
from nemo.sections import DataSource
from nemo.data import Batches, load, prepare

torch.set_num_threads(1)

def peak():  # not ru_maxrss, which begins with that of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e6

root, out, memory = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
before = peak()
if not out.exists():
    prepare("big", DataSource(source=f"folder:{root}", size=512), out)
else:
    data, digest = load(out, memory).restrict([1, 0]), hashlib.sha256()
    for split, shuffle in (("train", True), ("train", False), ("val", False), ("test", False)):
        batches = Batches(data.splits[split], data.mean, data.std, 2, shuffle=shuffle)
        for images, labels in batches:
            digest.update(images.numpy().ravel())
            digest.update(labels.numpy())
    print(digest.hexdigest())
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures by Linux's /proc")
def test_a_data_set_above_the_cap_never_is_in_memory(
    make_images: Callable[..., Path], tmp_path: Path
) -> None:
    """314 MB of images with a cap of 20 MB; a batch of 2 takes 6 MB as float32."""
    root, out, cap = make_images("big", {"a": 200, "b": 200}), tmp_path / "out", 0.02

    def run(memory: float | None) -> list[str]:
        arguments = [str(root), str(out), json.dumps(memory)]
        command = [sys.executable, "-c", WORK, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    (prepared,) = run(None)
    size = (out / "arrays.safetensors").stat().st_size / 1e9
    digest, streamed = run(cap)
    same, kept = run(None)
    assert size > 15 * cap
    assert digest == same
    constant = 0.13  # GB: a chunk being decoded and counted, or a batch and its copies
    assert float(prepared) < cap + constant < size / 2
    assert float(streamed) < cap + constant
    assert float(kept) > size
