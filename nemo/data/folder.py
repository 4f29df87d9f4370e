"""Image folders, and .tar files of them, decoded without unpacking (ours).

Accepted at PATH, a folder or a .tar, perhaps below one more folder of its own:

    train/CLASS/image  test/CLASS/image       each split a folder, or train.tar and test.tar
    CLASS/image                               a single split, out of which others are held

`training`, `testing`, `val`, `valid` and `validation` are splits too, in upper or lower case.
Validation images are the test split if there is no other, and the validation split if there is.
Folders that could be classes as well as splits of another name are an error. Hidden files,
`__MACOSX`, side files such as labels.csv, and whatever is in no class folder are ignored; any other
file among a class's images is an error, lest a part of the data set goes missing silently. A
SHA256SUMS beside a .tar is checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nemo.data.errors import DataError
from nemo.data.images import ImageFile, ImageFiles, RawSplit, RawSplits
from nemo.data.tree import Parts, Tree, scan_folder, scan_tar

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
SIDE_FILES = (".txt", ".md", ".csv", ".json", ".xml", ".html", ".yaml", ".yml", ".ini", ".db")
Classes = dict[str, list[ImageFile]]  # class name to its images, both sorted
LAYOUTS = (
    "train/CLASS/image and test/CLASS/image (or training, testing, val, valid, validation), "
    "CLASS/image, or a .tar of either"
)


def load_folder(path: Path, size: int | None) -> RawSplits:
    """Find the images of the folder or .tar at `path`; class names are sorted.

    They are decoded when they are needed (`ImageFiles`); then they must be readable, and of one
    size where `size` is None.

    Raises:
        DataError: there is nothing at `path`, it is laid out in none of the ways above, or a .tar
            cannot be read; a class is empty or not in every split.
    """
    try:
        splits = {name: _classes(path, name, tree) for name, tree in _splits(path).items()}
        names = list(splits["train"])
        if len(names) < 2:
            raise DataError(f"{path}: only one class folder ({names[0]}); accepted: 2 or more")
        _same_classes(path, splits)
        files = [f for classes in splits.values() for found in classes.values() for f in found]
        images = ImageFiles(files, None if size is None else (size, size), files[0])
    except OSError as error:
        raise DataError(f"{error.filename or path}: {error.strerror or error}") from None
    raw, start = {}, 0
    for split, classes in splits.items():
        counts = [len(found) for found in classes.values()]
        labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        raw[split] = RawSplit(images[start : start + len(labels)], labels)
        start += len(labels)
    return RawSplits(path.resolve().name.removesuffix(".tar"), names, raw)


def _splits(path: Path) -> dict[str, Tree]:
    """What is below each split's folder; everything is `train` where there are none."""
    tree = _unwrapped(_scan(path), splits=True)
    if not tree.tops:
        raise DataError(f"{path}: no class folders; accepted: {LAYOUTS}")
    named = {name: split for name in sorted(tree.tops) if (split := _split_of(name))}
    training = [name for name, split in named.items() if split == "train"]
    if len(named) < len(tree.tops) and not any(tree.below(name).tops for name in training):
        _check_classes(path, tree)
        return {"train": tree}  # a class may well be called train
    splits: dict[str, Tree] = {}
    for name, split in named.items():
        if split in splits:
            raise DataError(f"{path}: {name} is a second {split} folder; accepted: one of a kind")
        splits[split] = below = _unwrapped(tree.below(name))
        if not below.tops:
            raise DataError(f"{path}: no class folders in {name}; accepted: {LAYOUTS}")
    if "train" not in splits:
        raise DataError(f"{path}: {', '.join(splits)} without train; accepted: {LAYOUTS}")
    if "test" not in splits and "val" in splits:
        splits["test"] = splits.pop("val")
    return splits


def _split_of(name: str) -> str | None:
    """The split that a folder of this name holds, if it is the name of one."""
    return SPLIT_NAMES.get(name.lower())


def _check_classes(path: Path, tree: Tree) -> None:
    """Raise DataError where class folders hold nothing but the same folders, as splits would."""
    inside = [tree.below(name) for name in tree.tops]
    (first, *others), images = inside, [p for t in inside for p in t.files if _is_image(p)]
    alike = len(first.tops) > 1 and others and all(t.tops == first.tops for t in others)
    if alike and all(len(parts) > 1 for parts in images):
        names, within = (", ".join(sorted(t.tops)[:3]) for t in (tree, first))
        raise DataError(
            f"{path}: {names} could be classes, or splits of {within}; accepted: {LAYOUTS}"
        )


def _is_image(parts: Parts) -> bool:
    return Path(parts[-1]).suffix.lower() in IMAGES


def _unwrapped(tree: Tree, splits: bool = False) -> Tree:
    """The tree without the single folders around it, as when a folder was packed with its name.

    Args:
        splits: whether to stop at the folder of a split.
    """
    while len(tree.tops) == 1 and tree.depth > 2:
        (top,) = tree.tops
        if splits and _split_of(top):
            break
        tree = tree.below(top)
    return tree


def _scan(path: Path) -> Tree:
    """Everything at `path`, with train.tar and the like in the place of folders."""
    if path.is_file():
        if path.suffix != ".tar":
            raise DataError(f"{path}: neither a folder nor a .tar; accepted: {LAYOUTS}")
        _check_sum(path)
        return scan_tar(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder or .tar; accepted: {LAYOUTS}")
    tree = scan_folder(path)
    for tar in sorted(path.glob("*.tar")):
        if _split_of(tar.stem):
            if tar.stem in tree.tops:
                raise DataError(f"{path}: both {tar.stem} and {tar.name}; accepted: one of them")
            _check_sum(tar)
            tree = tree | scan_tar(tar, within=tar.stem)
    return tree


def _classes(path: Path, split: str, tree: Tree) -> Classes:
    """The images of each class of a split."""
    classes: Classes = {name: [] for name in sorted(tree.tops)}
    for parts, file in sorted(tree.files.items()):
        suffix = Path(parts[-1]).suffix.lower()
        if len(parts) < 2 or suffix in SIDE_FILES:
            continue
        if suffix not in IMAGES:
            raise DataError(f"{file}: no image file; accepted: {', '.join(IMAGES)}")
        classes[parts[0]].append(file)
    for name, images in classes.items():
        if not images:
            accepted = ", ".join(IMAGES)
            raise DataError(f"{path}: class {name!r} of {split} has no images ({accepted})")
    return classes


def _same_classes(path: Path, splits: dict[str, Classes]) -> None:
    train = set(splits["train"])
    for split, classes in splits.items():
        for name in sorted(train ^ set(classes)):
            has, lacks = ("train", split) if name in train else (split, "train")
            raise DataError(
                f"{path}: class {name!r} is in {has} but not in {lacks}; "
                "accepted: the same classes in every split"
            )


def _check_sum(tar: Path) -> None:
    """Compare `tar` with the SHA256SUMS beside it, if there is one that names it."""
    for digest, name in _sums(tar.with_name("SHA256SUMS")):
        if name == tar.name:
            with tar.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != digest.lower():
                raise DataError(f"{tar}: damaged: its SHA-256 is not the one in SHA256SUMS")


def _sums(path: Path) -> Iterator[tuple[str, str]]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            digest, _, name = line.partition(" ")
            yield digest, name.strip().removeprefix("*").removeprefix("./")
