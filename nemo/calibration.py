"""BatchNorm's statistics, estimated anew on the data that a module will see (ours)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nemo.data import Augment, Batches, Prepared
from nemo.signature import call, evaluating

AS_CUT = "batch_norm_as_cut.safetensors"  # beside a module: its BatchNorms' statistics before that


@torch.no_grad()
def recalibrate_bn(module: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> None:
    """Estimate the running statistics of every BatchNorm anew, on these batches only.

    A module's binary masks change what its layers receive; this moves no weight. The statistics
    become plain averages over the batches, which should be those of a training: mixed, since the
    images of one class vary less, and augmented, since the weights are used to that.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    with evaluating(module):
        for norm in norms:
            norm.train()
        for inputs, labels in batches:
            if len(labels) > 1:  # one image has no statistics where a map is a single pixel
                call(module, inputs)
        module.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def batch_norms(module: nn.Module) -> dict[str, Tensor]:
    """{key of the state_dict: copy of it} of the running statistics of every BatchNorm."""
    kind = nn.modules.batchnorm._BatchNorm
    return {
        f"{name}.{buffer}": value.detach().cpu().clone()
        for name, norm in module.named_modules()
        if isinstance(norm, kind)
        for buffer, value in norm.named_buffers()
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
