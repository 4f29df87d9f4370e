"""BatchNorm's statistics, estimated anew on the data that a module will see (ours)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nemo.data import Augment, Batches, Prepared
from nemo.signature import call, evaluating, moved, pairs, samples

AS_CUT = "batch_norm_as_cut.safetensors"  # beside a module: its BatchNorms' statistics before that


@torch.no_grad()
def recalibrate_bn(module: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> None:
    """Estimate the running statistics of every BatchNorm anew, on these batches only.

    A module's binary masks change what its layers receive; this moves no weight. A BatchNorm that
    is not called, such as one of an auxiliary head, stays as it is. The statistics
    become plain averages over the batches, which should be those of a training: mixed, since the
    images of one class vary less, and augmented, since the weights are used to that.
    The `info` of a module then says `recalibrated_bn`.

    Args:
        batches: pairs (inputs, labels); labels are not used.

    Raises:
        ValueError: no batch has two images, or the statistics are not finite.
    """
    if not norms_of(module):
        return
    like = next(v for v in module.state_dict().values() if v.is_floating_point())
    with estimating_bn(module):
        for inputs, _ in pairs(batches):
            if samples(inputs) > 1:  # one image has no statistics where a map is a single pixel
                call(module, moved(inputs, like))
    if isinstance(info := getattr(module, "info", None), dict):  # to know modules needs their code
        info["recalibrated_bn"] = True


@contextmanager
def estimating_bn(module: nn.Module) -> Iterator[None]:
    """Running statistics begin anew, as plain averages over the batches that follow. They are what
    they were where nothing is seen, and all of them after an error, also one of these: none of them
    saw anything, or they are not finite."""
    norms, seen, finite = list(norms_of(module).values()), set[int](), False
    before = [(norm.momentum, norm.training, dict(batch_norms(norm))) for norm in norms]
    try:
        with evaluating(module):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.train()
            yield
        seen = {id(norm) for norm in norms if has_seen(norm)}
        finite = all(bool(value.isfinite().all()) for value in batch_norms(module).values())
    finally:
        for norm, (momentum, training, statistics) in zip(norms, before, strict=True):
            norm.momentum, norm.training = momentum, training
            if not finite or id(norm) not in seen:
                norm.load_state_dict(norm.state_dict() | statistics)
    if not seen:
        raise ValueError("no batch has two images of the classes, as BatchNorm's statistics need")
    if not finite:
        raise ValueError("BatchNorm's statistics are not finite: are the weights, and the inputs?")


def has_seen(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether statistics that began anew are of a batch; one that is called as a function counts
    none."""
    counted = int(norm.get_buffer("num_batches_tracked"))
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    return bool(counted) or bool(mean.any()) or bool((variance != 1).any())


def batch_norms(module: nn.Module) -> dict[str, Tensor]:
    """{key of the state_dict: copy of it} of the running statistics of every BatchNorm."""
    return {
        f"{name}.{buffer}".removeprefix("."): value.detach().cpu().clone()
        for name, norm in norms_of(module).items()
        for buffer, value in norm.named_buffers()
    }


def norms_of(module: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
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
