"""BatchNorm's statistics for every module of a network, estimated before any is cut (ours).

Of each batch, the images of some random classes run under the mask of these classes, which gives
the statistics of this draw. Those for a module of the classes S are a mean over draws, in which one
weighs more the more its classes T are those of S:

    weight of T = softmax over draws of 16 * |S and T| / |S or T|

Shapes: D draws, C classes, N_l channels of a BatchNorm.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nemo.calibration import batch_norms, estimating_bn, norms_of
from nemo.data.subsets import draw_subset
from nemo.masking.class_masks import ClassMasks
from nemo.masking.generators import Modular, as_modular
from nemo.masking.labels import check_labels, pairs, positions
from nemo.signature import call, moved, rows

SHARPNESS = 16.0  # 8 is too flat; from 16 to 24 it changes little (reports/LOG.md)


class BatchNormForCuts:
    """The BatchNorms' statistics of random draws of classes, made by `nemo.bn_for_cuts`.

    Args:
        drawn: bool (D, C), the classes of each draw.
        statistics: {key of the base model's state_dict: float (D, N_l)}.
    """

    def __init__(self, drawn: Tensor, statistics: Mapping[str, Tensor]) -> None:
        self.drawn = drawn
        self.statistics = dict(statistics)

    def select(self, classes: Sequence[int]) -> dict[str, Tensor]:
        """{key: (N_l,)} of running statistics for the module of `classes`.

        Raises:
            ValueError: no positions, no class, or one that does not exist.
        """
        chosen, count = positions(classes), self.drawn.shape[1]
        unknown = [c for c in chosen if not 0 <= c < count]
        if unknown or not chosen:
            raise ValueError(f"classes: {chosen}; accepted: positions from 0..{count - 1}")
        wanted = torch.isin(torch.arange(count), torch.tensor(chosen))
        alike = (self.drawn & wanted).sum(1) / (self.drawn | wanted).sum(1)
        weights = (SHARPNESS * alike).softmax(0)
        return {key: weights.to(each) @ each for key, each in self.statistics.items()}

    def ready(self, modular: nn.Module, classes: Sequence[int]) -> Modular:
        """A copy of `modular` to cut the module of `classes` out of: its BatchNorms have the
        statistics for it. With its soft masks, the copy may be at chance.

        Raises:
            ValueError: as `select`, or `modular` is no modular network, or another one.
        """
        network, own = copy.deepcopy(as_modular(modular)), self.select(classes)
        known = network.model.state_dict()
        other = [k for k in own if k not in known or own[k].shape != known[k].shape]
        if other:
            raise ValueError(f"{other[0]}: no BatchNorm of this network has such statistics")
        network.model.load_state_dict(known | own)
        return network


@torch.no_grad()
def bn_for_cuts(
    modular: nn.Module,
    masks: ClassMasks,
    batches: Iterable[tuple[Any, Tensor]],
    sizes: Sequence[int] = (2, 3, 5),
    draws: int = 400,
    seed: int = 0,
) -> BatchNormForCuts:
    """The running statistics of every BatchNorm, for all modules that will be cut.

    Cutting then needs no image. `modular` stays as it is.

    Args:
        batches: (inputs, labels (B,)) of a training, as for `recalibrate_bn`. They are gone through
            again until there are as many as `draws`, unless nothing comes the second time.
        sizes: how many classes are drawn; all of them are one more size, and the first draw.
        draws: how many. One of fewer than two images is left out: of many classes, draw more.

    Raises:
        ValueError: labels are no positions of classes that have masks, nothing was seen, or what is
            given is no modular network or no class masks.
    """
    network = copy.deepcopy(as_modular(modular))
    if not isinstance(masks, ClassMasks):
        kind = type(masks).__name__
        raise ValueError(f"masks: a {kind}; accepted: what nemo.class_masks returns")
    if any(size < 1 for size in sizes):
        raise ValueError(f"sizes: {list(sizes)}; accepted: numbers of classes, from 1")
    if draws < 1:
        raise ValueError(f"draws: {draws}; accepted: from 1")
    norms, every = norms_of(network.model).values(), list(range(masks.num_classes))
    if not norms:
        return BatchNormForCuts(torch.ones(1, len(every), dtype=torch.bool), {})
    random, like = np.random.default_rng(seed), next(network.parameters())
    drawn, found = [], []
    with estimating_bn(network.model):
        for step, (inputs, labels) in enumerate(_again(batches, draws)):
            check_labels(labels, {}, len(every))
            classes = draw_subset(random, len(every), sizes) if step else every
            chosen = torch.isin(labels.long(), torch.tensor(classes, device=labels.device))
            if int(chosen.sum()) > 1:
                for norm in norms:
                    norm.reset_running_stats()
                call(network.under(masks.select(classes)), rows(moved(inputs, like), chosen))
                drawn.append(torch.isin(torch.tensor(every), torch.tensor(classes)))
                found.append(batch_norms(network.model))
    keys = [key for key, value in found[0].items() if value.is_floating_point()]
    return BatchNormForCuts(
        torch.stack(drawn), {key: torch.stack([each[key] for each in found]) for key in keys}
    )


def _again(batches: Iterable[tuple[Any, Tensor]], count: int) -> Iterator[tuple[Any, Tensor]]:
    """`count` of the batches, from the first one again where they are fewer; all of an iterator."""
    left = count
    while left:
        before = left
        for batch in pairs(batches):
            yield batch
            left -= 1
            if not left:
                return
        if left == before:
            return
