"""Batches out of memory or a file: vectorised normalisation, crop and flip.

Order and augmentation are a pure function of (seed, epoch), so that a resumed training sees what an
uninterrupted one would have seen. Shapes: N images in the split, B in a batch, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo.data.prepared import Split

Part = tuple[int, int]  # (k, n): the k-th of n parts of a batch, counted from 0


@dataclass(frozen=True)
class Augment:
    """What training does to an image: shift it by up to `crop` pixels, mirror half of them."""

    flip: bool = False
    crop: int = 0


@dataclass(frozen=True)
class _Plan:
    """One pass: the order of the images, and what happens to each; all (N,), by image."""

    order: Tensor
    top: Tensor
    left: Tensor
    mirrored: Tensor | None


class Batches:
    """Iterates over (images (B, 3, H, W) float32 normalised, labels (B,) int64) on `device`.

    The split moves to `device` once, as uint8, and is augmented there; images that were left in
    their file (`StoredImages`) come batch by batch, and are the same. `set_epoch` chooses the
    epoch; without it every pass is the same. The last batch may be shorter; when
    shuffling (training), a last batch of a single image joins the one before it, because BatchNorm
    and the pairwise losses need two. So does one of fewer images than `part` counts.

    Args:
        part: (k, n) yields only the k-th of n parts of each batch's images, for one of n processes;
            the labels stay those of the whole batch.
        per_class: shuffled images of a class come so many at a time, as metric learning draws
            batches; what is left of each class comes last.
        steps: batches of an epoch, which begins where the one before ended; None is one pass over
            the images.

    Raises:
        ValueError: the split is empty, `batch_size` is not positive, a shuffled split or batch
            would have a single image, or one of the n parts no image.
    """

    def __init__(
        self,
        split: Split,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        channels_last: bool = False,
        shuffle: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        part: Part = (0, 1),
        per_class: int | None = None,
        steps: int | None = None,
    ) -> None:
        least = max(2 if shuffle else 1, part[1])
        if len(split) < least or batch_size < least:
            raise ValueError(
                f"{len(split)} images in batches of {batch_size}: accepted: {least} or more of each"
                + (f" for {part[1]} processes" if part[1] > 1 else " when shuffling" * shuffle)
            )
        self.images = split.images.to(device)
        self.labels = split.labels.to(device)
        self.augment = augment or Augment()
        self.shuffle = shuffle
        self.seed = seed
        self.part = part
        self.per_class = per_class
        self.batch_size = batch_size
        self.epoch = 0
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        # x / 255, minus mean, by std: as one multiplication and one addition on 0..255
        deviation = torch.tensor(std, dtype=torch.float64).view(3, 1, 1)
        self.scale = (1 / (255 * deviation)).float().to(device)
        self.shift = (-torch.tensor(mean).double().view(3, 1, 1) / deviation).float().to(device)
        self.bounds = _bounds(len(split), batch_size, least)
        self.steps = len(self.bounds) if steps is None else steps

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the passes that follow."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        augmented = self.augment.crop > 0 or self.augment.flip
        plan, planned = None, -1
        for number in range(self.epoch * self.steps, (self.epoch + 1) * self.steps):
            passed, place = divmod(number, len(self.bounds))
            if passed != planned and (self.shuffle or augmented):
                plan, planned = self._plan(passed), passed
            start, stop = self.bounds[place]
            mine = share(stop - start, self.part)
            if plan is None:
                images, labels = self.images[start:stop][mine], self.labels[start:stop]
            else:
                labels = self.labels[plan.order[start:stop]]
                index = plan.order[start:stop][mine]
                images = self.images[index]
                if augmented:
                    mirrored = None if plan.mirrored is None else plan.mirrored[index]
                    top, left = plan.top[index], plan.left[index]
                    images = shift_and_mirror(images, top, left, mirrored, self.augment.crop)
            pixels = images.to(torch.float32, memory_format=self.memory_format)
            yield pixels.mul_(self.scale).add_(self.shift), labels

    def _plan(self, passed: int) -> _Plan:
        """Draw a pass over the images on the CPU, so that every device trains on the same ones."""
        count, crop, device = len(self.labels), self.augment.crop, self.images.device
        mixed = np.random.SeedSequence([self.seed, passed]).generate_state(1, np.uint64)
        random = torch.Generator().manual_seed(int(mixed[0]))
        order = torch.randperm(count, generator=random)
        top, left = torch.randint(0, 2 * crop + 1, (2, count), generator=random)
        mirrored = torch.rand(count, generator=random) < 0.5
        if not self.shuffle:
            order = torch.arange(count)
        elif self.per_class is not None:
            order = _by_groups(order, self.labels.cpu(), self.per_class)
        order, top, left, mirrored = (drawn.to(device) for drawn in (order, top, left, mirrored))
        return _Plan(order, top, left, mirrored if self.augment.flip else None)


def shift_and_mirror(
    images: Tensor, top: Tensor, left: Tensor, mirrored: Tensor | None, crop: int
) -> Tensor:
    """Pad (B, 3, H, W) by `crop` black pixels, cut H x W at (top, left), then mirror some.

    Args:
        top, left: (B,) in 0..2*crop.
        mirrored: (B,) bool, or None for no image at all.
    """
    if crop:
        height, width = images.shape[2:]
        padded = F.pad(images, (crop, crop, crop, crop))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, 3, 2c+1, 2c+1, H, W) view
        images = windows[torch.arange(len(images), device=images.device), :, top, left]
    if mirrored is None:
        return images
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def share(count: int, part: Part) -> slice:
    """The rows that the k-th of n parts has of `count`; sizes differ by one at most."""
    k, n = part
    return slice(count * k // n, count * (k + 1) // n)


def _bounds(count: int, batch_size: int, least: int) -> list[tuple[int, int]]:
    """(start, stop) of each batch; a last one of fewer than `least` joins the one before it."""
    starts = range(0, count, batch_size)
    bounds = [(start, min(start + batch_size, count)) for start in starts]
    if len(bounds) > 1 and bounds[-1][1] - bounds[-1][0] < least:
        bounds[-2:] = [(bounds[-2][0], count)]
    return bounds


def _by_groups(order: Tensor, labels: Tensor, size: int) -> Tensor:
    """The order (N,) with `size` images of a class at a time, each group at the place of its first;
    incomplete ones come last."""
    count, own = len(order), labels[order]
    by_class = own.argsort(stable=True)  # places in `order`
    sizes = own.bincount()
    rank = torch.arange(count) - (sizes.cumsum(0) - sizes)[own[by_class]]  # within its class
    first = by_class[torch.arange(count) - rank % size]
    incomplete = rank - rank % size + size > sizes[own[by_class]]
    return order[by_class[(first + count * incomplete).argsort(stable=True)]]
