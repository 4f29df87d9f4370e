from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nemo.data import DataError, folder
from nemo.data.images import RawSplit, RawSplits

BOTH = {"train/cat": 3, "train/dog": 2, "test/cat": 1, "test/dog": 2}


def load_folder(path: Path, size: int | None) -> RawSplits:
    """With every image decoded, as `prepare` does it."""
    raw = folder.load_folder(path, size)
    splits = {n: RawSplit(split.images.decode(), split.labels) for n, split in raw.splits.items()}
    return RawSplits(raw.title, raw.classes, splits)


def same(one: RawSplits, other: RawSplits) -> bool:
    return (
        one.classes == other.classes
        and list(one.splits) == list(other.splits)
        and all(
            np.array_equal(split.images, other.splits[name].images)
            and np.array_equal(split.labels, other.splits[name].labels)
            for name, split in one.splits.items()
        )
    )


def test_train_and_test_folders(make_images: Callable[..., Path]) -> None:
    root = make_images("pets", BOTH)
    raw = load_folder(root, None)
    assert (raw.title, raw.classes) == ("pets", ["cat", "dog"])
    assert raw.splits["train"].labels.tolist() == [0, 0, 0, 1, 1]
    assert raw.splits["test"].labels.tolist() == [0, 1, 1]
    pixels = np.asarray(Image.open(root / "train/dog/0001.png"))
    assert np.array_equal(raw.splits["train"].images[4], pixels.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"cat": 2, "dog": 3}, {"train": 5}),
        ({"train/cat": 2, "train/dog": 3}, {"train": 5}),
        ({"packed/train/cat": 2, "packed/train/dog": 3}, {"train": 5}),
        ({"packed/cat": 2, "packed/dog": 3}, {"train": 5}),
        ({"train/cat": 2, "train/dog": 3, "val/cat": 1, "val/dog": 1}, {"train": 5, "test": 2}),
        ({"train/cat/big": 1, "train/cat/small": 1, "train/dog": 3}, {"train": 5}),
        ({"train": 2, "bus": 3}, {"train": 5}),  # a class called train
        ({**BOTH, "valid/cat": 1, "valid/dog": 3}, {"train": 5, "test": 3, "val": 4}),
        ({**BOTH, "extra/cat": 1}, {"train": 5, "test": 3}),
        (
            {"Training/a": 3, "Training/b": 2, "Testing/a": 1, "Testing/b": 1},
            {"train": 5, "test": 2},
        ),
        ({"TRAIN/a": 1, "TRAIN/b": 2, "Valid/a": 1, "Valid/b": 1}, {"train": 3, "test": 2}),
        ({"p/Train/a": 1, "p/Train/b": 2, "p/Test/a": 1, "p/Test/b": 1}, {"train": 3, "test": 2}),
        ({"a/images": 2, "b/images": 3}, {"train": 5}),
    ],
)
def test_layouts(
    make_images: Callable[..., Path], counts: dict[str, int], expected: dict[str, int]
) -> None:
    raw = load_folder(make_images("pets", counts), None)
    assert {name: len(split.labels) for name, split in raw.splits.items()} == expected


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        (
            {"dev_set/cat": 1, "dev_set/dog": 1, "main_set/cat": 3, "main_set/dog": 3},
            r"pets: dev_set, main_set could be classes, or splits of cat, dog; accepted: train",
        ),
        (
            {**BOTH, "Training/cat": 1, "Training/dog": 2},
            r"pets: train is a second train folder; accepted: one of a kind",
        ),
    ],
)
def test_ambiguous_layouts_are_refused(
    make_images: Callable[..., Path], counts: dict[str, int], line: str
) -> None:
    with pytest.raises(DataError, match=line):
        load_folder(make_images("pets", counts), None)


def test_tars_equal_the_folder(
    make_images: Callable[..., Path], make_tar: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    root = make_images("pets", BOTH)
    plain = load_folder(root, None)
    whole = load_folder(make_tar(root, tmp_path / "whole.tar"), None)
    assert whole.title == "whole"
    assert same(plain, whole)
    for split in ("train", "test"):
        make_tar(root / split, tmp_path / f"two/{split}.tar")
    assert same(plain, load_folder(tmp_path / "two", None))
    with tarfile.open(tmp_path / "two/test.tar", "w") as tar:
        tar.add(root / "test", "./test")  # packed with its own name
    assert same(plain, load_folder(tmp_path / "two", None))


def test_ignored_files(make_images: Callable[..., Path]) -> None:
    root = make_images("pets", BOTH)
    plain = load_folder(root, None)
    (root / "train/.ipynb_checkpoints").mkdir()
    (root / "__MACOSX").mkdir()
    for name in ("README", "train/x.npy", "train/cat/.DS_Store", "train/dog/Thumbs.db"):
        (root / name).write_bytes(b"?")
    (root / "train/cat/labels.CSV").write_text("0")
    assert same(plain, load_folder(root, None))


def test_mixed_sizes(make_images: Callable[..., Path], tmp_path: Path) -> None:
    make_images("pets", {"cat": 2}, size=(16, 8))
    root = make_images("pets", {"dog": 2}, size=(12, 20))
    message = r"cat/0000\.png is 16 x 8, .*dog/0000\.png is 12 x 20; set the data set's size"
    with pytest.raises(DataError, match=message):
        load_folder(root, None)
    raw = load_folder(root, 8)
    assert raw.splits["train"].images.shape == (4, 3, 8, 8)
    pixels = np.asarray(Image.open(root / "cat/0000.png"))[:, 4:12]  # its centre, no resizing
    assert np.array_equal(raw.splits["train"].images[0], pixels.transpose(2, 0, 1))


def test_every_kind_of_image_becomes_rgb(make_images: Callable[..., Path]) -> None:
    root = make_images("pets", {"cat": 1, "dog": 1})
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for mode, suffix in (("L", "png"), ("1", "png"), ("LA", "png"), ("P", "gif"), ("CMYK", "jpg")):
        grey.convert(mode).save(root / f"cat/{mode}.{suffix}")
    raw = load_folder(root, None)
    assert raw.splits["train"].images.shape == (7, 3, 8, 8)


def test_a_big_jpeg_is_close_to_the_exact_resize(
    tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    root = make_images("pets", {"cat": 1, "dog": 1})
    ramp = np.add.outer(np.arange(160), np.arange(200))[..., None] * [0.7, 0.5, 0.3]
    Image.fromarray(ramp.astype(np.uint8)).save(root / "cat/big.jpg", quality=95)
    loaded = load_folder(root, 16).splits["train"].images[1].transpose(1, 2, 0)
    centre = ramp[:, 20:180].reshape(16, 10, 16, 10, 3).mean(axis=(1, 3))
    assert np.abs(loaded - centre).max() < 4


@pytest.mark.parametrize("cut", [100, 700, 10240, 10752])
def test_a_truncated_tar(
    make_images: Callable[..., Path],
    make_tar: Callable[[Path, Path], Path],
    tmp_path: Path,
    cut: int,
) -> None:
    path = make_tar(make_images("pets", BOTH), tmp_path / "pets.tar")
    data = path.read_bytes()
    end = len(data.rstrip(b"\0"))
    path.write_bytes(data[: max(end - cut, 100)])
    with pytest.raises(DataError, match=r"pets\.tar: (cut short|not a whole)"):
        load_folder(path, None)


def test_a_tar_cut_between_members_or_damaged_inside(
    make_images: Callable[..., Path], make_tar: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    path = make_tar(make_images("pets", BOTH), tmp_path / "pets.tar")
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        start = tar.getmembers()[5].offset
    path.write_bytes(data[:start])
    with pytest.raises(DataError, match=r"pets\.tar: cut short or damaged after"):
        load_folder(path, None)
    path.write_bytes(data[:start] + b"?" * 512 + data[start + 512 :])
    with pytest.raises(DataError, match=r"pets\.tar: cut short or damaged after"):
        load_folder(path, None)


def test_members_that_would_escape_are_never_written(
    make_images: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_images("pets", BOTH)
    plain = load_folder(root, None)
    with tarfile.open(tmp_path / "pets.tar", "w") as tar:
        tar.add(root, "pets")
        tar.addfile(tarfile.TarInfo("../../escaped.png"), io.BytesIO(b""))
    assert same(plain, load_folder(tmp_path / "pets.tar", None))
    with tarfile.open(tmp_path / "pets.tar", "a") as tar:
        link = tarfile.TarInfo("pets/train/cat/passwd.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"cat/passwd\.png: a link or special file"):
        load_folder(tmp_path / "pets.tar", None)


def test_sha256sums_are_checked(
    make_images: Callable[..., Path], make_tar: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    path = make_tar(make_images("pets", BOTH), tmp_path / "tars/train.tar")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    sums = path.with_name("SHA256SUMS")
    sums.write_text(f"{'0' * 64}  other.tar\n{digest} *./train.tar\n")
    load_folder(path, None)
    sums.write_text(f"{'0' * 64}  train.tar\n")
    for where in (path, path.parent):
        with pytest.raises(DataError, match=r"train\.tar: damaged: its SHA-256 is not the one"):
            load_folder(where, None)
