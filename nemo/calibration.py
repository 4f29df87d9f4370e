"""BatchNorm's statistics, estimated anew on the data that a module will see (ours)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nemo.data import Augment, Batches, Prepared
from nemo.data.subsets import draw_subset
from nemo.masking.generators import as_modular
from nemo.masking.labels import check_labels, pairs
from nemo.signature import call, evaluating, moved, rows

if TYPE_CHECKING:
    from nemo.masking.class_masks import ClassMasks

AS_CUT = "batch_norm_as_cut.safetensors"  # beside a module: its BatchNorms' statistics before that


@torch.no_grad()
def recalibrate_bn(module: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> None:
    """Estimate the running statistics of every BatchNorm anew, on these batches only.

    A module's binary masks change what its layers receive; this moves no weight. The statistics
    become plain averages over the batches, which should be those of a training: mixed, since the
    images of one class vary less, and augmented, since the weights are used to that.

    Raises:
        ValueError: no batch has two images.
    """
    if not _norms(module):
        return
    with _estimating(module):
        for inputs, labels in batches:
            if len(labels) > 1:  # one image has no statistics where a map is a single pixel
                call(module, inputs)


@torch.no_grad()
def recalibrate_bn_for_cuts(
    modular: nn.Module,
    masks: ClassMasks,
    batches: Iterable[tuple[Any, Tensor]],
    sizes: Sequence[int] = (2, 3, 5),
    seed: int = 0,
) -> None:
    """Estimate the running statistics of every BatchNorm once, for all modules that will be cut.

    Of each batch, the images of some random classes run under the mask of these classes; the
    statistics become averages over such parts of batches. Cutting then needs no image. Best suited
    is a network that was trained with a cut pass, which saw the same. The statistics are for what
    is cut from now on: with its soft masks, the network itself needs those it had, and is broken.

    Args:
        modular: changed in place; its weights are not.
        batches: (inputs, labels (B,)) of a training, as for `recalibrate_bn`.
        sizes: how many classes are drawn; all of them are one more size, and the first draw. Parts
            of fewer than two images are left out: of many classes, draw more.

    Raises:
        ValueError: labels are no positions of classes that have masks, or nothing was seen.
    """
    network = as_modular(modular)
    if not _norms(network.model):
        return
    if any(size < 1 for size in sizes):
        raise ValueError(f"sizes: {list(sizes)}; accepted: numbers of classes, from 1")
    random, every = np.random.default_rng(seed), list(range(masks.num_classes))
    like = next(network.parameters())
    with _estimating(network.model):
        for step, (inputs, labels) in enumerate(pairs(batches)):
            check_labels(labels, {}, len(every))
            classes = draw_subset(random, len(every), sizes) if step else every
            drawn = torch.isin(labels.long(), torch.tensor(classes, device=labels.device))
            if int(drawn.sum()) > 1:
                call(network.under(masks.select(classes)), rows(moved(inputs, like), drawn))


@contextmanager
def _estimating(module: nn.Module) -> Iterator[None]:
    """Running statistics begin anew, as plain averages over the batches that follow. They are what
    they were after an error, and where nothing was seen, which is one."""
    norms, seen = list(_norms(module).values()), False
    before = [(norm.momentum, norm.training, dict(batch_norms(norm))) for norm in norms]
    try:
        with evaluating(module):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.train()
            yield
        seen = any(int(norm.get_buffer("num_batches_tracked")) for norm in norms)
    finally:
        for norm, (momentum, training, statistics) in zip(norms, before, strict=True):
            norm.momentum, norm.training = momentum, training
            if not seen:
                norm.load_state_dict(norm.state_dict() | statistics)
    if not seen:
        raise ValueError("no batch has two images of the classes, as BatchNorm's statistics need")


def batch_norms(module: nn.Module) -> dict[str, Tensor]:
    """{key of the state_dict: copy of it} of the running statistics of every BatchNorm."""
    return {
        f"{name}.{buffer}".removeprefix("."): value.detach().cpu().clone()
        for name, norm in _norms(module).items()
        for buffer, value in norm.named_buffers()
    }


def _norms(module: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Those that have running statistics."""
    return {
        name: norm
        for name, norm in module.named_modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None
    }


def training_batches(
    data: Prepared, batch_size: int, device: torch.device, seed: int, **options: Any
) -> Batches:
    """The training images shuffled and augmented, as a training sees them; options of `Batches`."""
    return Batches(
        data.splits["train"],
        data.mean,
        data.std,
        batch_size,
        device=device,
        shuffle=True,
        augment=Augment(flip=data.flip, crop=data.crop),
        seed=seed,
        **options,
    )
