"""Class masks and what they say (paper section 4.3 and its evaluation): NRR, cohesion, coupling.

Masks are dicts {layer: tensor} with samples or classes in rows. Shapes: S samples, C classes,
N_l neurons of layer l, K = sum of N_l.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo.masking.labels import check_labels, positions
from nemo.signature import call, evaluating, moved, pairs

STEP = 0.05  # by how much an empty layer lowers its threshold, and the last one it tries
PAIR_BLOCK = 2048  # rows of samples that are compared at a time
CLASS_BLOCK = 256  # rows of classes


class SubsetMasks(dict[str, Tensor]):
    """{layer: bool (N_l,)} of a class subset, and the `classes` it stands for."""

    def __init__(self, masks: Mapping[str, Tensor], classes: Sequence[int]) -> None:
        super().__init__(masks)
        self.classes = list(classes)


class ClassMasks(dict[str, Tensor]):
    """{layer: bool (C, N_l)}: the neurons each class uses, made by `nemo.class_masks`.

    `dead` is {layer: classes} for which no neuron reached even the lowest threshold. Their most
    frequent 5 % are kept instead.
    """

    def __init__(self, masks: Mapping[str, Tensor], dead: Mapping[str, list[int]]) -> None:
        super().__init__(masks)
        self.dead = {layer: classes for layer, classes in dead.items() if classes}

    @property
    def num_classes(self) -> int:
        return len(next(iter(self.values())))

    def select(self, classes: Sequence[int]) -> SubsetMasks:
        """The OR of the masks of `classes` (paper section 4.4).

        Raises:
            ValueError: no positions, no class, one that does not exist, or one named twice.
        """
        chosen = positions(classes)
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"classes must be distinct and at least one, got {chosen}")
        unknown = [c for c in chosen if not 0 <= c < self.num_classes]
        if unknown:
            raise ValueError(f"no masks of class {unknown[0]}; accepted: 0..{self.num_classes - 1}")
        return SubsetMasks({layer: mask[chosen].any(0) for layer, mask in self.items()}, chosen)


@torch.inference_mode()
def sample_bits(
    modular: nn.Module, loader: Iterable[tuple[Any, Tensor]]
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Run `modular` in eval mode over the batches; yield ({layer: bool (B, N_l)}, labels (B,))."""
    weights = next(modular.parameters(), None)
    with evaluating(modular):
        for inputs, labels in pairs(loader):
            check_labels(labels, {})
            here = labels.device if weights is None else weights.device
            _, masks = call(modular, moved(inputs, here))
            check_labels(labels, masks)
            yield {layer: mask > 0 for layer, mask in masks.items()}, labels.to(here)


def masks_from_frequency(frequency: Mapping[str, Tensor], threshold: float) -> ClassMasks:
    """`threshold_masks` together with the list of dead layers; frequency is {layer: (C, N_l)}."""
    dead = {layer: dead_classes(values, threshold) for layer, values in frequency.items()}
    return ClassMasks(threshold_masks(frequency, threshold), dead)


def mask_frequency(
    batches: Iterable[tuple[Mapping[str, Tensor], Tensor]],
) -> dict[str, Tensor]:
    """Fraction of each class's samples with the bit on: {layer: float64 (C, N_l)}; of floats, their
    mean over the class. Bits cost B x K additions per batch, whatever C is.

    Args:
        batches: ({layer: (B, N_l)}, labels (B,)) pairs, such as `sample_bits` yields.

    Raises:
        ValueError: no batches, or a class (a label below the largest) without samples.
    """
    on: dict[str, Tensor] = {}
    samples = torch.zeros(0, dtype=torch.float64)
    for bits, labels in batches:
        check_labels(labels, bits)
        labels = labels.long()
        if int(labels.min()) < 0:
            raise ValueError(f"labels hold {int(labels.min())}; accepted: 0 and above")
        classes, here = max(len(samples), int(labels.max()) + 1), labels.cpu()
        samples = _grow(samples, classes) + here.bincount(minlength=classes)
        for layer, bit in bits.items():
            empty = torch.zeros(0, bit.shape[1], dtype=torch.float64)
            on[layer] = _grow(on.get(layer, empty), classes)
            if bit.is_floating_point():
                belongs = F.one_hot(labels, classes).float().T  # (C, B)
                on[layer] += (belongs @ bit.float()).cpu()
            else:
                on[layer].index_add_(0, here, bit.cpu().double())
    if not len(samples):
        raise ValueError("the loader gave no batches")
    if not samples.all():
        missing = (samples == 0).nonzero().flatten().tolist()
        raise ValueError(f"no sample of class(es) {missing}: every class needs at least one")
    return {layer: total.div_(samples[:, None]) for layer, total in on.items()}


def _grow(rows: Tensor, count: int) -> Tensor:
    if len(rows) == count:
        return rows
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


@overload
def threshold_masks(frequency: Tensor, threshold: float) -> Tensor: ...
@overload
def threshold_masks(frequency: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]: ...
def threshold_masks(
    frequency: Tensor | Mapping[str, Tensor], threshold: float
) -> Tensor | dict[str, Tensor]:
    """Bool masks of the neurons with frequency >= threshold, per class and layer.

    If no neuron of a layer reaches it, the threshold is lowered for this class and layer by 0.05 at
    a time, down to 0.05. If none reaches 0.05, the layer is dead for the class. Its most frequent
    5 % are kept then (at least one; the lower index wins a tie). The authors' code draws random
    ones instead.

    Args:
        frequency: (C, N_l), or {layer: (C, N_l)}; values in [0, 1].
        threshold: in (0, 1].

    Raises:
        ValueError: threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}")
    if isinstance(frequency, Tensor):
        return torch.stack([_threshold_row(row, threshold) for row in frequency])
    return {layer: threshold_masks(values, threshold) for layer, values in frequency.items()}


def _threshold_row(row: Tensor, threshold: float) -> Tensor:
    steps = int(round(threshold / STEP, 6))
    lowered = [round(threshold - STEP * step, 10) for step in range(steps)]
    for limit in [*(t for t in lowered if t > STEP), min(threshold, STEP)]:
        mask = row >= limit
        if mask.any():
            return mask
    kept = max(1, round(0.05 * len(row)))
    mask = torch.zeros(len(row), dtype=torch.bool, device=row.device)
    mask[row.argsort(descending=True, stable=True)[:kept]] = True
    return mask


def dead_classes(frequency: Tensor, threshold: float) -> list[int]:
    """The classes (rows of (C, N_l)) for which the layer is dead: none reaches the last limit."""
    dead = frequency.amax(1) < min(threshold, STEP)
    return [int(c) for c in dead.nonzero().flatten()]


def retention_rate(class_masks: Mapping[str, Tensor]) -> float:
    """Neuron retention rate: kept neurons / K, the mean over classes for {layer: (C, N_l)}, or
    that of one subset for {layer: (N_l,)}."""
    kept = _concat(class_masks)
    return int(kept.sum()) / kept.numel()


def coupling(class_masks: Mapping[str, Tensor]) -> float:
    """Mean Jaccard similarity of the masks of all pairs of different classes; NaN for one class."""
    return mean_of_pairs(coupling_matrix(class_masks))


def mean_of_pairs(similar: Tensor) -> float:
    """The mean of a matrix (C, C) above its diagonal; NaN for one class."""
    pairs = torch.ones_like(similar, dtype=torch.bool).triu(1)
    return similar[pairs].mean().item()


def coupling_matrix(class_masks: Mapping[str, Tensor]) -> Tensor:
    """Jaccard similarities (C, C) of the class masks, all layers together; float64."""
    blocks = _concat(class_masks).split(CLASS_BLOCK)  # as floats, two at a time: never C x K
    rows = [torch.cat([a.float() @ b.float().T for b in blocks], 1) for a in blocks]
    both = torch.cat(rows).double()  # exact: counts of neurons, below 2 ** 24
    sizes = both.diagonal()
    return both / (sizes[:, None] + sizes[None, :] - both).clamp(min=1)


def cohesion(
    bits: Mapping[str, Tensor], labels: Tensor, class_masks: Mapping[str, Tensor]
) -> float:
    """How alike the samples of a class are inside its class mask.

    The mean over classes of the mean Jaccard similarity of its samples' (bits AND class mask), over
    all pairs of different samples. Classes with fewer than two samples do not count; NaN if none
    has two. Two empty sets have similarity 0.

    Args:
        bits: {layer: bool (S, N_l)}, a row per sample.
        labels: (S,) class of each sample.
        class_masks: {layer: bool (C, N_l)}.

    Raises:
        ValueError: no class masks, no bits of one of their layers, or labels that are not integers
            (S,) in 0..C-1.
    """
    if lacking := class_masks.keys() - bits.keys():
        raise ValueError(f"bits lack {min(lacking)!r}; accepted: those of all class masks")
    every = _concat({layer: bits[layer] for layer in class_masks})
    masks = _concat(class_masks).to(every.device)
    check_labels(labels, {}, len(masks))
    if len(every) != len(labels):
        raise ValueError(f"bits have {len(every)} rows, not {len(labels)}; accepted: one per label")
    means = []
    for label in labels.unique().tolist():
        rows = every[labels == label][:, masks[label]]
        count = len(rows)
        if count < 2:
            continue
        blocks = rows.split(PAIR_BLOCK)  # as floats, two at a time: never samples x K of them
        sums = [_jaccard(a.float(), b.float()).double().sum() for a in blocks for b in blocks]
        with_itself = rows.any(1).sum()  # J(i, i) is 1, or 0 for an empty row
        pairs = count * (count - 1)
        means.append(((torch.stack(sums).sum() - with_itself) / pairs).item())
    return sum(means) / len(means) if means else float("nan")


def _jaccard(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) and (N, K) of zeros and ones -> (M, N); intersections by one matrix product."""
    both = a @ b.T
    either = a.sum(1)[:, None] + b.sum(1)[None, :] - both
    return both / either.clamp(min=1)


def _concat(masks: Mapping[str, Tensor]) -> Tensor:
    """{layer: (R, N_l)} or {layer: (N_l,)} -> bool (R, K)."""
    if not masks:
        raise ValueError("masks is empty: expected {layer: tensor} with at least one layer")
    return torch.cat([torch.atleast_2d(mask) for mask in masks.values()], 1).bool()
