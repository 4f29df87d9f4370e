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
from nemo.signature import call, evaluating, rows

if TYPE_CHECKING:
    from nemo.masking.class_masks import ClassMasks
    from nemo.masking.generators import Modular

AS_CUT = "batch_norm_as_cut.safetensors"  # beside a module: its BatchNorms' statistics before that


@torch.no_grad()
def recalibrate_bn(module: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> None:
    """Estimate the running statistics of every BatchNorm anew, on these batches only.

    A module's binary masks change what its layers receive; this moves no weight. The statistics
    become plain averages over the batches, which should be those of a training: mixed, since the
    images of one class vary less, and augmented, since the weights are used to that.
    """
    if not _norms(module):
        return
    with _estimating(module):
        for inputs, labels in batches:
            if len(labels) > 1:  # one image has no statistics where a map is a single pixel
                call(module, inputs)


@torch.no_grad()
def recalibrate_bn_for_cuts(
    modular: Modular,
    masks: ClassMasks,
    batches: Iterable[tuple[Any, Tensor]],
    sizes: Sequence[int] = (2, 3, 5),
    seed: int = 0,
) -> None:
    """Estimate the running statistics of every BatchNorm once, for all modules that will be cut.

    Of each batch, the images of some random classes run under the mask of these classes; the
    statistics become averages over the batches. It suits a network that was trained with a cut
    pass, which saw such batches: a module then works as cut, and cutting needs no image. They are
    for what is cut from now on. With its soft masks, the network itself needs those it had.

    Args:
        batches: of a training, as for `recalibrate_bn`.
        sizes: how many classes are drawn; all of them are one more size.
    """
    if not _norms(modular.model):
        return
    random, every = np.random.default_rng(seed), list(range(masks.num_classes))
    with _estimating(modular.model):
        for step, (inputs, labels) in enumerate(batches):
            # first all classes, so that there are statistics where draws have hardly an image
            classes = draw_subset(random, len(every), sizes) if step else every
            drawn = torch.isin(labels, torch.tensor(classes, device=labels.device))
            if int(drawn.sum()) > 1:
                call(modular.under(masks.select(classes)), rows(inputs, drawn))


@contextmanager
def _estimating(module: nn.Module) -> Iterator[None]:
    """Running statistics begin anew, as plain averages over the batches that follow."""
    norms = list(_norms(module).values())
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    with evaluating(module):
        for norm in norms:
            norm.train()
        yield
        module.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def batch_norms(module: nn.Module) -> dict[str, Tensor]:
    """{key of the state_dict: copy of it} of the running statistics of every BatchNorm."""
    return {
        f"{name}.{buffer}": value.detach().cpu().clone()
        for name, norm in _norms(module).items()
        for buffer, value in norm.named_buffers()
    }


def _norms(module: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    kind = nn.modules.batchnorm._BatchNorm
    return {name: norm for name, norm in module.named_modules() if isinstance(norm, kind)}


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
