"""BatchNorm's statistics for all modules of a network, estimated before they are cut (ours)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nemo.calibration import estimating_bn, norms_of
from nemo.data.subsets import draw_subset
from nemo.masking.class_masks import ClassMasks
from nemo.masking.generators import as_modular
from nemo.masking.labels import check_labels, pairs
from nemo.signature import call, moved, rows


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
        ValueError: labels are no positions of classes that have masks, nothing was seen, or what is
            given is no modular network or no class masks.
    """
    network = as_modular(modular)
    if not isinstance(masks, ClassMasks):
        kind = type(masks).__name__
        raise ValueError(f"masks: a {kind}; accepted: what nemo.class_masks returns")
    if not norms_of(network.model):
        return
    if any(size < 1 for size in sizes):
        raise ValueError(f"sizes: {list(sizes)}; accepted: numbers of classes, from 1")
    random, every = np.random.default_rng(seed), list(range(masks.num_classes))
    like = next(network.parameters())
    with estimating_bn(network.model):
        for step, (inputs, labels) in enumerate(pairs(batches)):
            check_labels(labels, {}, len(every))
            classes = draw_subset(random, len(every), sizes) if step else every
            drawn = torch.isin(labels.long(), torch.tensor(classes, device=labels.device))
            if int(drawn.sum()) > 1:
                call(network.under(masks.select(classes)), rows(moved(inputs, like), drawn))
