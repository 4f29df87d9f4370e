"""Losses on masks: NeMo's contrastive loss (paper section 4.2) and MwT's cohesion and coupling.

Shapes: masks are {layer: (B, N_l)} with one row per sample, labels are (B,). Every loss is the mean
over layers. An all-zero mask has cosine 0 with everything, and gradient 0: the cosine has no
derivative there, and the epsilon that keeps it finite would give one of 1e11.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo.masking.labels import check_labels

EPSILON = 1e-12  # the smallest length of a mask
ContrastiveForm = Literal["equation", "released"]


def contrastive_loss(
    masks: Mapping[str, Tensor],
    labels: Tensor,
    tau: float,
    form: ContrastiveForm = "equation",
) -> Tensor:
    """NeMo's loss (scalar): small if masks are alike within a class and unlike between classes.

    With s_ij the cosine of the masks of samples i and j in a layer and P(i) the samples of i's
    class, i included: mean over i of -log(sum_{j in P(i)} e^{s_ij/tau} / sum_j e^{s_ij/tau}).

    Args:
        masks: {layer: (B, N_l)}.
        labels: (B,) integers.
        tau: temperature, above 0.
        form: `equation` is the paper's formula. `released` is what the authors' code computes: the
            cosines outside each sum are zeroed before the exponential. So every excluded pair
            adds e^0 = 1 to the numerator, and B ones are in the denominator.

    Raises:
        ValueError: no masks, tau not above 0, an unknown form, or shapes that do not fit.
    """
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}")
    if form not in ("equation", "released"):
        raise ValueError(f"form must be 'equation' or 'released', got {form!r}")
    _check(masks, labels)
    same = labels[:, None] == labels[None, :]
    return _contrast(_cosines(masks), same, tau, form)


def _contrast(cosines: Tensor, same: Tensor, tau: float, form: ContrastiveForm) -> Tensor:
    """(L, B, B) cosines and (B, B) bools -> scalar. One exponential serves both sums: the shift by
    the row's maximum cancels in their ratio, and keeps every sum that is in a logarithm above 0."""
    shift = cosines.detach().amax(2, keepdim=True)
    weights = ((cosines - shift) / tau).exp()
    positives = (weights * same).sum(2)
    everything = weights.sum(2)
    if form == "released":
        # zeroing before exp: each of the B - |P(i)| excluded pairs adds e^0 to the numerator, and
        # in the denominator every pair is excluded from one of its two sums
        one = (-shift[..., 0] / tau).exp()
        positives = positives + one * (~same).sum(1)
        everything = everything + one * len(same)
    return (everything.log() - positives.log()).mean()


def mwt_loss(masks: Mapping[str, Tensor], labels: Tensor, alpha: float, beta: float) -> Tensor:
    """MwT's loss (arXiv 2306.09376): alpha * cohesion loss + beta * coupling loss (scalar).

    Args:
        masks: {layer: (B, N_l)}.
        labels: (B,) integers.
        alpha, beta: weights of the two, which `mwt_terms` defines.

    Raises:
        ValueError: no masks, or shapes that do not fit.
    """
    cohesion, coupling = mwt_terms(masks, labels)
    return alpha * cohesion + beta * coupling


def mwt_terms(masks: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """MwT's (cohesion loss, coupling loss): 1 - mean cosine of same-class pairs, and the mean
    cosine of different-class pairs, over the strict upper triangle of the batch.

    A batch without same-class (or different-class) pairs drops that term: it is 0, where the
    authors' code gives NaN. Arguments and errors are those of `mwt_loss`.
    """
    _check(masks, labels)
    upper = torch.ones(len(labels), len(labels), dtype=torch.bool, device=labels.device).triu(1)
    same = (labels[:, None] == labels[None, :]) & upper
    different = upper & ~same
    cosines = _cosines(masks).mean(0)
    cohesion = ((1 - cosines) * same).sum() / same.sum().clamp(min=1)
    coupling = (cosines * different).sum() / different.sum().clamp(min=1)
    return cohesion, coupling


def _cosines(masks: Mapping[str, Tensor]) -> Tensor:
    """{layer: (B, N_l)} -> (L, B, B), in float32 or wider: half precision is too coarse, also for
    a product under autocast."""
    layers = []
    device = next(iter(masks.values())).device
    with torch.autocast(device.type, enabled=False):
        for mask in masks.values():
            mask = mask if mask.dtype == torch.float64 else mask.float()
            dead = mask.detach().abs().amax(1, keepdim=True) <= EPSILON
            unit = F.normalize(torch.where(dead, 0.0, mask), dim=1, eps=EPSILON)
            layers.append(unit @ unit.T)
    return torch.stack(layers)


def _check(masks: Mapping[str, Tensor], labels: Tensor) -> None:
    check_labels(labels, masks)
    if not masks:
        raise ValueError("masks is empty: expected {layer: (B, N_l)} with at least one layer")
