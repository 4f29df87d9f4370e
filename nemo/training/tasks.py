"""What is minimised: a task returns a dict with `loss` and its named parts (paper section 4.2).

The training loop knows nothing of masks or teachers; it takes `loss` and averages the rest.
Shapes: images (B, 3, H, W), labels (B,), logits (B, C). With several processes, images are those of
this one, and all else is of the whole batch: a loss on masks compares all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo.config import Family, Method, Params
from nemo.distributed import gathered
from nemo.masking.generators import Masks
from nemo.masking.losses import contrastive_loss, mwt_terms

Parts = dict[str, Tensor]
TaskLoss = Callable[[Any, Tensor, Tensor], Tensor]
MaskLoss = Callable[[Masks, Tensor], tuple[Tensor, Parts]]


class Task:
    """A classification loss, and for modular models a loss on the masks added to it."""

    def __init__(self, task_loss: TaskLoss, mask_loss: MaskLoss | None = None) -> None:
        self.task_loss = task_loss
        self.mask_loss = mask_loss

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Parts:
        output = gathered(model(images), len(labels))
        if self.mask_loss is None:
            loss = self.task_loss(output, images, labels)
            return {"loss": loss, "task": loss, "train_accuracy": _accuracy(output, labels)}
        output, masks = output
        task = self.task_loss(output, images, labels)
        penalty, parts = self.mask_loss(masks, labels)
        return {
            "loss": task + penalty,
            "task": task,
            **parts,
            **_mask_health(masks),
            "train_accuracy": _accuracy(output, labels),
        }


def make_task(
    params: Params, method: Method, family: Family, teacher: nn.Module | None = None
) -> Task:
    """The task of a cell; with a `teacher`, the classification loss is DeiT's distillation."""
    task_loss = cross_entropy if teacher is None else Distillation(teacher)
    if method == "standard":
        return Task(task_loss)
    if method == "mwt":
        return Task(task_loss, mwt_penalty(params.mwt.alpha.of(family), params.mwt.beta.of(family)))
    loss = params.loss
    return Task(task_loss, contrastive_penalty(loss.alpha.of(family), loss.tau, loss.form))


def cross_entropy(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


class Distillation:
    """0.5 CE(cls) + 0.25 [KL(teacher, cls) + KL(teacher, dist)] at temperature 1.

    The frozen teacher sees the same augmented batch. In train mode the student gives (cls, dist).
    """

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher.eval().requires_grad_(False)

    def __call__(self, output: tuple[Tensor, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = gathered(self.teacher(images), len(labels)).float().log_softmax(1)
        cls, dist = (logits.float() for logits in output)
        divergence = sum(
            F.kl_div(logits.log_softmax(1), target, reduction="batchmean", log_target=True)
            for logits in (cls, dist)
        )
        return 0.5 * F.cross_entropy(cls, labels) + 0.25 * divergence


def contrastive_penalty(alpha: float, tau: float, form: Any) -> MaskLoss:
    """NeMo: alpha times the contrastive loss."""

    def penalty(masks: Masks, labels: Tensor) -> tuple[Tensor, Parts]:
        contrast = contrastive_loss(masks, labels, tau, form)
        return alpha * contrast, {"contrast": contrast}

    return penalty


def mwt_penalty(alpha: float, beta: float) -> MaskLoss:
    """MwT: alpha times the cohesion loss plus beta times the coupling loss."""

    def penalty(masks: Masks, labels: Tensor) -> tuple[Tensor, Parts]:
        cohesion, coupling = mwt_terms(masks, labels)
        parts = {"cohesion_loss": cohesion, "coupling_loss": coupling}
        return alpha * cohesion + beta * coupling, parts

    return penalty


@torch.no_grad()
def _accuracy(output: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    logits = output[0] + output[1] if isinstance(output, tuple) else output
    return (logits.argmax(1) == labels).float().mean()


@torch.no_grad()
def _mask_health(masks: Masks) -> Parts:
    """Of this batch's sample masks: the fraction of bits that are on (not the class masks' NRR),
    and that of layers in which a sample has no bit on: its signal ends there."""
    on = torch.stack([(mask > 0).sum() for mask in masks.values()]).sum()
    dead = torch.stack([(mask <= 0).all(1).float().mean() for mask in masks.values()])
    return {"mask_on": on / sum(mask.numel() for mask in masks.values()), "dead_rate": dead.mean()}
