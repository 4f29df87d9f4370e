"""Logits of a model over a data set, and top-1 accuracy from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nemo.distributed import all_gather
from nemo.signature import call, check_targets, evaluating, pairs, pick


@torch.inference_mode()
def predict(
    model: nn.Module, batches: Iterable[tuple[Any, Tensor]], output: str | int | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (S, C), float32 on the CPU, and labels (S,), in eval mode; a modular model's are those
    of its soft per-sample masks. Of `Batches` that have a part for each of several processes,
    every process gets the whole.

    Args:
        output: key, attribute or index of the logits, where the model returns more.

    Raises:
        ValueError: no batches, ones that are no pairs, or labels that are no integers (B,).
    """
    several = getattr(batches, "part", (0, 1))[1] > 1
    logits, labels = [], []
    with evaluating(model):
        for inputs, target in pairs(batches):
            check_targets(target)
            found = pick(call(model, inputs), output)
            found = found[0] if isinstance(found, tuple) else found
            whole = all_gather(found.float(), len(target)) if several else found.float()
            logits.append(whole.cpu())
            labels.append(target.cpu())
    if not logits:
        raise ValueError("the loader gave no batches")
    return torch.cat(logits), torch.cat(labels)


def accuracy(logits: Tensor, labels: Tensor, classes: Sequence[int] | None = None) -> float:
    """Top-1 accuracy in [0, 1]; with `classes`, over their samples and with logits restricted to
    them (paper section 5.2: the standard model on a sub-task)."""
    if classes is not None:
        chosen = torch.tensor(list(classes))
        keep = torch.isin(labels, chosen)
        best = chosen[logits[keep][:, chosen].argmax(1)]
        return (best == labels[keep]).double().mean().item()
    return (logits.argmax(1) == labels).double().mean().item()


def guess_accuracy(labels: Tensor) -> float:
    """The accuracy of always saying the most frequent class of labels (S,): chance."""
    return float(labels.bincount().max()) / len(labels)
