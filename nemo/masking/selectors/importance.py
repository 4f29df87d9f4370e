"""Class masks of a network trained elsewhere: the neurons that matter most to a class (ours).

They look at the network itself, without mask generators, on the images of each class:

    taylor: |sum over positions of output * gradient of the loss|: to first order, what the loss
        would change by without the neuron (Molchanov et al., arXiv 1611.06440), class by class
    activation: mean of |output| over positions

Each is averaged over the class's samples, and every layer keeps the same share of its neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nemo.fields import Share, Strict
from nemo.masking.selectors.registry import selector

if TYPE_CHECKING:
    from torch import Tensor

    from nemo.masking.class_masks import ClassMasks
    from nemo.masking.observed import Observed

Scores = Iterator["tuple[dict[str, Tensor], Tensor]"]


class ImportanceParams(Strict):
    keep: Share  # of each layer's neurons, per class; at least one


@selector("taylor", params=ImportanceParams)
def taylor(observed: Observed, params: ImportanceParams) -> ClassMasks:
    return _top(_mean_scores(observed, by_gradient=True), params.keep)


@selector("activation", params=ImportanceParams)
def activation(observed: Observed, params: ImportanceParams) -> ClassMasks:
    return _top(_mean_scores(observed, by_gradient=False), params.keep)


def _mean_scores(observed: Observed, by_gradient: bool) -> dict[str, Tensor]:
    """{layer: (C, N_l)}: the mean score of each class's samples."""
    from nemo.masking.class_masks import mask_frequency

    kind = f"importance by gradient: {by_gradient}"
    return observed.once(kind, lambda: mask_frequency(_scores(observed, by_gradient)))


def _scores(observed: Observed, by_gradient: bool) -> Scores:
    """({layer: (B, N_l)}, labels (B,)) of every batch, in eval mode.

    Both are gradients for masks of ones: that of the loss is the sum of output * gradient that a
    mask acts on, and that of the sum of |output| * mask is |output|.

    Raises:
        ValueError: labels do not fit, or a layer's masks do not reach the loss by gradient.
    """
    import torch
    import torch.nn.functional as F

    from nemo.masking.hooks import acting
    from nemo.masking.labels import check_labels
    from nemo.signature import call, evaluating, moved, pairs, pick

    modular = observed.modular
    model, like = modular.model, next(modular.parameters())
    with evaluating(model):
        for inputs, labels in pairs(observed.batches):
            check_labels(labels, {})
            labels, sizes = labels.long().to(like.device), modular.layers
            masks = {k: like.new_ones(len(labels), n).requires_grad_() for k, n in sizes.items()}
            magnitudes: list[Tensor] = []

            def scale(output: Tensor, mask: Tensor, name: str, seen: Any = magnitudes) -> Tensor:
                if by_gradient:
                    return output * mask
                seen.append((output.detach().abs() * mask).sum() * (mask.numel() / output.numel()))
                return output

            with torch.enable_grad(), acting(model, modular.sites, masks, scale):
                logits = pick(call(model, moved(inputs, like)), modular.takes.output)
                if by_gradient:
                    if logits.ndim != 2 or len(logits) != len(labels):
                        shape = tuple(logits.shape)
                        raise ValueError(f"taylor: logits are {shape}; accepted: (B, C), B labels")
                    check_labels(labels, {}, logits.shape[1])
                    total = F.cross_entropy(logits, labels, reduction="sum")
                else:
                    total = torch.stack(magnitudes).sum()
            yield _magnitudes_of_gradients(total, masks), labels


def _magnitudes_of_gradients(total: Tensor, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """{layer: (B, N_l)}. Raise ValueError where no gradient reaches a layer: nothing is known of
    its neurons, which need not be idle."""
    import torch

    grads: Any = [None] * len(masks)
    if total.requires_grad:
        grads = torch.autograd.grad(total, list(masks.values()), allow_unused=True)
    cut_off = [layer for layer, grad in zip(masks, grads, strict=True) if grad is None]
    if cut_off:
        raise ValueError(
            f"selector: no gradient reaches {', '.join(cut_off)}; accepted: layers without "
            "no_grad; of taylor also without detach, and on the way to the logits"
        )
    return {layer: grad.abs() for layer, grad in zip(masks, grads, strict=True)}


def _top(scores: dict[str, Tensor], keep: float) -> ClassMasks:
    """The share of each layer's neurons with the highest mean score, per class; the lower index
    wins a tie."""
    import torch

    from nemo.masking.class_masks import ClassMasks

    masks = {}
    for layer, mean in scores.items():
        if not mean.isfinite().all():
            raise ValueError(f"{layer}: scores are not finite: are its weights, and the inputs?")
        kept = max(1, round(keep * mean.shape[1]))
        order = mean.argsort(dim=1, descending=True, stable=True)[:, :kept]
        masks[layer] = torch.zeros_like(mean, dtype=torch.bool).scatter(1, order, True)
    return ClassMasks(masks, {})
