"""Prepared data: decode a source once, and load it in milliseconds ever after (ours).

A prepared folder holds `arrays.safetensors` (images (N, 3, H, W) uint8 and labels (N,) int64 of
train, val and test) and `meta.json` (everything else). Both are byte-identical on every run: no
times, hosts or paths. `read_meta` needs no torch, so that stages that only report stay light.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo.data.errors import DataError
from nemo.data.images import Labels, RawSplit, RawSplits
from nemo.data.sources import CLASSES, load_source
from nemo.data.splits import hold_out, limit_to
from nemo.data.stored import StoredImages, stored_images, write_arrays
from nemo.data.subsets import parse_subset
from nemo.files import new_folder, write_json, writing

if TYPE_CHECKING:
    from torch import Tensor

    from nemo.sections import DataSource

ARRAYS, META = "arrays.safetensors", "meta.json"
SPLITS = ("train", "val", "test")
TEST_FRACTION = 0.2  # held out where the source has no test images of its own
META_KEYS = {
    *("name", "title", "classes", "size", "mean", "std", "counts", "flip", "crop", "sha256")
}


@dataclass(frozen=True)
class Split:
    """Images (N, 3, H, W) uint8, in memory or left in their file, and labels (N,) int64, 0..C-1."""

    images: Tensor | StoredImages
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor, labels: Tensor) -> Split:
        """Those images alone, with `labels` in the place of theirs."""
        images = self.images
        return Split(
            images.take(rows) if isinstance(images, StoredImages) else images[rows], labels
        )


@dataclass(frozen=True)
class Prepared:
    """A prepared data set; `mean` and `std` of the training images, on a 0..1 scale."""

    name: str
    title: str
    classes: tuple[str, ...]
    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool
    crop: int
    sha256: str  # of the arrays file, whatever `restrict` left of it
    splits: dict[str, Split]

    def restrict(self, classes: Sequence[int]) -> Prepared:
        """The same with only these classes, labelled 0..T-1 in the order given.

        Raises:
            DataError: no class, a class twice, or one that the data set does not have.
        """
        import torch

        chosen = list(classes)
        last = len(self.classes) - 1
        known = all(0 <= position <= last for position in chosen)
        if not chosen or not known or len(set(chosen)) < len(chosen):
            raise DataError(f"classes {chosen}: accepted: some of 0 to {last}, each once")
        relabel = torch.full((len(self.classes),), -1, dtype=torch.int64)
        relabel[chosen] = torch.arange(len(chosen))
        splits = {}
        for name, split in self.splits.items():
            labels = relabel[split.labels]
            keep = labels >= 0
            splits[name] = split.take(keep, labels[keep])
        return replace(self, classes=tuple(self.classes[c] for c in chosen), splits=splits)


def prepare(
    name: str,
    source: DataSource,
    out: str | Path,
    downloads: str | Path = "downloads",
    check: Callable[[list[str]], object] = lambda classes: None,
) -> None:
    """Decode `source`, hold out validation images and write the folder `out`, all or nothing.

    Validation images are a fraction `source.validation` of each class's training images, chosen by
    `source.seed`, unless the source brings its own; a source without test images gives a fifth
    of each class first. Of a source's `classes` and training images (`limit`) a part may be taken;
    only that is decoded. An earlier prepared folder at `out` is replaced. `check` sees the class
    names before anything is written, where they are known also before a download, and may raise.

    Raises:
        DataError: the source cannot be used (see `load_source`), a class is too small to be split,
            `source.classes` or `source.limit` do not fit the source, or `source.crop` the images,
            or `out` is something other than prepared data.
    """
    out = Path(out)
    _check_replaceable(out)
    known = known_classes(name, source)
    if known is not None:
        check(known)
    raw = load_source(source.source, source.size, Path(downloads))
    if source.classes is not None:
        raw = _of_classes(raw, source.classes, f"data.{name}.classes")
    check(raw.classes)
    splits = _with_held_out(raw, source, f"data.{name}.limit")
    height, width = splits["train"].images.shape[2:]
    if height != width:
        raise DataError(
            f"data.{name}: images of {width} x {height}; "
            f"accepted: square ones, or data.{name}.size to make them so"
        )
    if source.crop >= height:
        raise DataError(
            f"data.{name}.crop: {source.crop} on {height} x {width} images; "
            f"accepted: 0 to {height - 1}"
        )
    meta = {
        "name": name,
        "title": source.title or raw.title,
        "classes": raw.classes,
        "size": [height, width],
        "counts": {split: len(splits[split].labels) for split in SPLITS},
        "flip": source.flip,
        "crop": source.crop,
    }
    _write(out, splits, meta)


def known_classes(name: str, source: DataSource) -> list[str] | None:
    """The class names that `prepare` gives, where they are known before a download; else None.

    Raises:
        DataError: `source.classes` do not fit the source.
    """
    known = CLASSES.get(source.source)
    if known is None or source.classes is None:
        return known
    return [known[c] for c in _chosen(known, source.classes, f"data.{name}.classes")]


def load(folder: str | Path, memory: float | None = None) -> Prepared:
    """Load a prepared folder.

    Args:
        memory: GB (1e9 bytes). The images of a larger file stay in it and are read by the batch,
            which is slower, and gives the same.

    Raises:
        DataError: `folder` is missing, is not a prepared folder, or was changed after `prepare`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    meta, path = read_meta(folder), Path(folder) / ARRAYS
    try:
        if _sha256(path) != meta["sha256"]:
            raise DataError(f"{path}: not the arrays that {META} describes; run `nemo prepare`")
        arrays: dict[str, Any] = load_file(path)  # maps the file, without reading it
        if memory is not None and path.stat().st_size > memory * 1e9:
            arrays |= {f"{s}.images": stored_images(path, f"{s}.images") for s in SPLITS}
        splits = {s: Split(arrays[f"{s}.images"], arrays[f"{s}.labels"]) for s in SPLITS}
    except (OSError, KeyError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run `nemo prepare`") from None
    about: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in meta.items()}
    del about["counts"]
    return Prepared(**about, splits=splits)


def read_meta(folder: str | Path) -> dict[str, Any]:
    """What `meta.json` of a prepared folder says; needs no torch.

    Raises:
        DataError: `folder` is missing or is not a prepared folder.
    """
    path = Path(folder) / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise DataError(
            f"{path}: {reason}; `nemo prepare` writes prepared folders, run it first"
        ) from None
    if not isinstance(meta, dict) or set(meta) != META_KEYS:
        raise DataError(f"{path}: not written by this version of `nemo prepare`; run it again")
    return meta


def _chosen(classes: list[str], subset: str, key: str) -> list[int]:
    """The positions of a source's classes that are taken."""
    try:
        chosen = parse_subset(subset, classes)
    except DataError as error:
        raise DataError(f"{key}: {error}") from None
    if len(chosen) < 2:
        raise DataError(f"{key}: {subset!r} is one class; accepted: two or more")
    return chosen


def _of_classes(raw: RawSplits, subset: str, key: str) -> RawSplits:
    """The images of a subset of the classes, labelled 0..T-1 in its order."""
    chosen = _chosen(raw.classes, subset, key)
    relabel = np.full(len(raw.classes), -1, dtype=np.int64)
    relabel[chosen] = np.arange(len(chosen))
    splits = {}
    for name, split in raw.splits.items():
        labels = relabel[split.labels]
        kept = np.flatnonzero(labels >= 0)
        splits[name] = RawSplit(split.images[kept], labels[kept])
    return RawSplits(raw.title, [raw.classes[c] for c in chosen], splits)


def _with_held_out(raw: RawSplits, source: DataSource, limit_key: str) -> dict[str, RawSplit]:
    """train, val and test, holding out of train what the source does not bring."""
    splits = dict(raw.splits)
    for split, fraction, what in (
        ("test", TEST_FRACTION, "testing"),
        ("val", source.validation, "validation"),
    ):
        if split == "val" and source.limit is not None:
            splits["train"] = _limited(splits["train"], source.limit, source.seed, limit_key)
        if split not in splits:
            train = splits["train"]
            kept, held = hold_out(train.labels, raw.classes, fraction, source.seed, what)
            splits["train"] = _rows(train, kept)
            splits[split] = _rows(train, held)
    return splits


def _limited(train: RawSplit, limit: int, seed: int, key: str) -> RawSplit:
    try:
        return _rows(train, limit_to(train.labels, limit, seed))
    except DataError as error:
        raise DataError(f"{key}: {error}") from None


def _rows(split: RawSplit, rows: Labels) -> RawSplit:
    return RawSplit(split.images[rows], split.labels[rows])


def _statistics(counts: Labels) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, on a 0..1 scale, from counts (3, 256) of values.

    The counts are exact, so that no order of summation shows in the result. A channel without any
    variation gets std 1, so that normalising it is harmless.
    """
    means, stds, values = [], [], np.arange(256) / 255
    for share in counts / counts.sum(1, keepdims=True):
        mean = float(share @ values)
        std = float(np.sqrt(share @ (values - mean) ** 2))
        means.append(round(mean, 6))
        stds.append(round(std, 6) or 1.0)
    return means, stds


def _check_replaceable(out: Path) -> None:
    empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not empty and not (out / META).is_file():
        raise DataError(f"{out}: exists and is no prepared folder; name another or remove it")


def _write(out: Path, splits: dict[str, RawSplit], meta: dict[str, Any]) -> None:
    """Write the two files, both or neither."""
    with new_folder(out) as folder:
        with writing(folder / ARRAYS):
            mean, std = _statistics(write_arrays(folder / ARRAYS, splits))
        about = {"mean": mean, "std": std, "sha256": _sha256(folder / ARRAYS)}
        write_json(folder / META, {**meta, **about})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
