"""The standard model cut down by what its channels do for the subset (class-aware pruning).

Channels of all layers are in one ranking, by |weight x gradient| (arXiv 1906.10771, 2312.05875).
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from nemo.alternatives.registry import alternative

if TYPE_CHECKING:
    from torch import nn

    from nemo.alternatives.context import Context


BATCHES = 10  # of the fine-tuning's size, of the subset's training images


@alternative("taylor", label="Taylor", budget=True)
def taylor(context: Context) -> nn.Module:
    """
    Raises:
        ValueError: torch-pruning is not installed, or the model cannot be made that small.
    """
    from nemo.alternatives.pruning import prune

    return prune(context, "taylor", partial(with_gradients, context), by="taylor", together=True)


def with_gradients(context: Context) -> nn.Module:
    """The standard model, in its gradients the sum of their sizes over batches: at a minimum those
    of single batches cancel."""
    import torch
    from torch.nn.functional import cross_entropy

    from nemo.calibration import training_batches
    from nemo.device import resolve_device

    device, part = resolve_device(context.params.device), context.data.restrict(context.classes())
    size = context.params.finetune.batch_size
    model = context.standard().to(device)
    weights = [p for p in model.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p) for p in weights]
    for images, labels in islice(training_batches(part, size, device, context.cell.seed), BATCHES):
        loss = cross_entropy(model(images), labels)
        for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            total += gradient.abs()
    for weight, total in zip(weights, sums, strict=True):
        weight.grad = total
    return model.cpu()
