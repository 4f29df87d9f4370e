"""BatchNorm's statistics for every module of a network, estimated before any is cut (ours).

Of each batch, the images of some random classes run under the mask of these classes, which gives
the statistics of this draw. Those for a module of the classes S are a mean over draws, in which one
weighs more the more its classes T are those of S:

    weight of T = softmax over draws of 16 * |S and T| / |S or T|

Some classes are drawn from those that the batch has images of. A draw may also be of all classes of
the network; then the images are the whole batch, whatever it has.

Shapes: D draws, C classes, N_l channels of a BatchNorm.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nemo.calibration import batch_norms, estimating_bn, has_seen, norms_of
from nemo.data.subsets import draw_subset
from nemo.masking.class_masks import ClassMasks
from nemo.masking.generators import Modular, as_modular
from nemo.masking.labels import check_labels, integer, integers, positions
from nemo.signature import call, moved, pairs, rows

# with fewer draws, or a sharpness of 8 or 32, modules are less accurate: reports/LOG.md
DRAWS = 400
SHARPNESS = 16.0


class BatchNormForCuts:
    """The BatchNorms' statistics of random draws of classes, made by `nemo.bn_for_cuts`.

    Args:
        drawn: bool (D, C), the classes of each draw.
        statistics: {key of the base model's state_dict: float (D, N_l)}.

    Raises:
        ValueError: they have other shapes or types, or a draw is of no class.
    """

    def __init__(self, drawn: Tensor, statistics: Mapping[str, Tensor]) -> None:
        if drawn.dtype != torch.bool or drawn.ndim != 2 or not len(drawn) or not drawn.any(1).all():
            raise ValueError("drawn: accepted: bool (draws, classes), at least one class a draw")
        for key, each in statistics.items():
            if not each.is_floating_point() or each.ndim != 2 or len(each) != len(drawn):
                raise ValueError(f"statistics[{key!r}]: accepted: float ({len(drawn)}, channels)")
            if not each.isfinite().all():
                raise ValueError(f"statistics[{key!r}]: not finite: are the weights and inputs?")
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
        wanted = _one_hot(chosen, count)
        alike = (self.drawn & wanted).sum(1) / (self.drawn | wanted).sum(1)
        weights = (SHARPNESS * alike.double()).softmax(0)
        return {key: (weights @ each.double()).to(each) for key, each in self.statistics.items()}

    def ready(self, modular: nn.Module, classes: Sequence[int]) -> Modular:
        """A copy of `modular` to cut the module of `classes` out of: its BatchNorms have the
        statistics for it. With its soft masks, the copy may be at chance.

        Raises:
            ValueError: as `select`; or `modular` is no modular network, or has other BatchNorms.
        """
        network, own = copy.deepcopy(as_modular(modular)), self.select(classes)
        shapes = {key: value.shape for key, value in own.items()}
        if shapes != {key: value.shape for key, value in _statistics(network.model).items()}:
            raise ValueError("these statistics are of other BatchNorms than this network has")
        network.model.load_state_dict(network.model.state_dict() | own)
        return network


@torch.no_grad()
def bn_for_cuts(
    modular: nn.Module,
    masks: ClassMasks,
    batches: Iterable[tuple[Any, Tensor]],
    sizes: Sequence[int] = (2, 3, 5),
    draws: int = DRAWS,
    seed: int = 0,
) -> BatchNormForCuts:
    """The running statistics of every BatchNorm, for all modules that will be cut.

    Cutting then needs no image. `modular` stays as it is. A BatchNorm that a draw does not call
    keeps its own statistics.

    Args:
        batches: (inputs, labels (B,)) of a training, as for `recalibrate_bn`. A loader is gone
            through again until there are as many as `draws`; an iterator gives a draw per batch.
        sizes: how many classes are drawn, of those in the batch. All of the network are one more
            size, and the first draw.
        draws: how many, less those of fewer than two images.

    Raises:
        ValueError: labels are no positions of classes that have masks, nothing was seen, sizes or
            draws are no positive integers, or what is given is no modular network or no class
            masks.
    """
    network = copy.deepcopy(as_modular(modular))
    if not isinstance(masks, ClassMasks):
        kind = type(masks).__name__
        raise ValueError(f"masks: a {kind}; accepted: what nemo.class_masks returns")
    sizes, draws = integers("sizes", sizes, 1), integer("draws", draws, 1)
    norms, own = norms_of(network.model), _statistics(network.model)
    every = list(range(masks.num_classes))
    if not norms:
        return BatchNormForCuts(torch.ones(1, len(every), dtype=torch.bool), {})
    random, like = np.random.default_rng(seed), next(network.parameters())
    drawn, found = [], []
    with estimating_bn(network.model):
        for step, (inputs, labels) in enumerate(_again(batches, draws)):
            check_labels(labels, {}, len(every))
            classes = _draw(random, labels, sizes, every) if step else every
            chosen = torch.isin(labels.long(), torch.tensor(classes, device=labels.device))
            if int(chosen.sum()) > 1:
                for norm in norms.values():
                    norm.reset_running_stats()
                call(network.under(masks.select(classes)), rows(moved(inputs, like), chosen))
                called = {name for name, norm in norms.items() if has_seen(norm)}
                seen = _statistics(network.model)
                found.append(
                    {k: seen[k] if k.rpartition(".")[0] in called else own[k] for k in own}
                )
                drawn.append(_one_hot(classes, len(every)))
    return BatchNormForCuts(
        torch.stack(drawn), {key: torch.stack([each[key] for each in found]) for key in own}
    )


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """{key: (N_l,)}: copies of running means and variances."""
    return {key: value for key, value in batch_norms(model).items() if value.is_floating_point()}


def _one_hot(classes: Sequence[int], count: int) -> Tensor:
    return torch.isin(torch.arange(count), torch.tensor(classes))


def _draw(
    random: np.random.Generator, labels: Tensor, sizes: Sequence[int], every: list[int]
) -> list[int]:
    """Some of the classes in the batch, or all of the network."""
    here = labels.unique().tolist()
    positions_here = draw_subset(random, len(here), sizes)
    return every if len(positions_here) == len(here) else [here[i] for i in positions_here]


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
