"""What is minimised: a task returns a dict with `loss` and its named parts (paper section 4.2).

The training loop knows nothing of masks or teachers; it takes `loss` and averages the rest.
Shapes: images (B, 3, H, W), labels (B,), logits (B, C). With several processes, images are those of
this one, and all else is of the whole batch: a loss on masks compares all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo.distributed import all_gather
from nemo.fields import Family, ParamsError
from nemo.masking.generators import Masks
from nemo.masking.objectives import Objective, ObjectiveParams, Parts, Penalty, Remembers
from nemo.training.cut_pass import ScheduledCutPass

TaskLoss = Callable[[Any, Tensor, Tensor], Tensor]
# A network has begun to learn once its task loss is lower than that of a guess by this share of it,
# or of ten classes' guess where there are more: a fifth less among 200 classes takes long.
LEFT_CHANCE = 0.2
LABEL_LOSS = "label_loss"  # beside the task loss of a distillation


class Rise:
    """How much of a penalty counts: nothing until the task loss has left chance, then more with
    each epoch, and all of it after `warmup` epochs (ours).

    With all of it from the first step, a network may never learn small, hard images: masks that
    know nothing of the classes win the contrast first.
    """

    def __init__(self, warmup: int, device: torch.device) -> None:
        self.warmup = warmup
        self.share = torch.zeros((), device=device)  # a tensor, which a recorded step reads anew

    def before_epoch(self, learning: int) -> None:
        """Set the share for an epoch that comes `learning` epochs after the loss left chance."""
        self.share.fill_(min(1.0, learning / self.warmup))


def guess_loss(labels: Tensor) -> float:
    """The cross-entropy of a guess by the frequencies of labels (N,), in nats."""
    frequencies = labels.bincount().double() / len(labels)
    return float(torch.special.entr(frequencies).sum())


def epochs_since_chance(history: Sequence[Mapping[str, float]], guess: float) -> int:
    """How many of the epochs so far came once the task loss had left chance, the first included.

    Of a distillation it is the cross-entropy with the labels that counts: how large the rest is
    at a guess depends on the teacher.

    Args:
        guess: the loss of a guess by the classes' frequencies.
    """
    left = guess - LEFT_CHANCE * min(guess, math.log(10))
    learned = [label_loss(row) < left for row in history]
    return len(learned) - learned.index(True) if any(learned) else 0


def label_loss(row: Mapping[str, float]) -> float:
    """The cross-entropy with the labels; the task loss of a distillation is another."""
    return row.get(LABEL_LOSS, row["task"])


class Task:
    """A classification loss, and for modular models a penalty on the masks added to it.

    `remedy` says what to try, besides a smaller learning rate, when the loss is not finite.
    """

    def __init__(
        self,
        task_loss: TaskLoss,
        penalty: Penalty | None = None,
        remedy: str = "",
        rise: Rise | None = None,
        cut_pass: ScheduledCutPass | None = None,
        guess: float = math.inf,
    ) -> None:
        self.task_loss = task_loss
        self.penalty = penalty
        self.remedy = remedy
        self.rise = rise
        self.cut_pass = cut_pass
        self.guess = guess

    def before_epoch(self, history: Sequence[Mapping[str, float]]) -> None:
        """What is minimised may depend on the epochs so far."""
        learning = epochs_since_chance(history, self.guess)
        if self.rise is not None:
            self.rise.before_epoch(learning)
        if self.cut_pass is not None:
            self.cut_pass.before_epoch(len(history), learning)

    def state_dict(self) -> dict[str, Any]:
        """What must be known to go on after an epoch, besides the history."""
        return {name: part.state_dict() for name, part in self._remembering().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self._remembering().items():
            part.load_state_dict(state[name])

    def _remembering(self) -> dict[str, Remembers | ScheduledCutPass]:
        parts = {"penalty": self.penalty, "cut_pass": self.cut_pass}
        return {
            n: part for n, part in parts.items() if isinstance(part, Remembers | ScheduledCutPass)
        }

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Parts:
        parts = self.recordable(model, images, labels)
        if self.cut_pass is None:
            return parts
        rest = self.rest(model, images, labels)
        return {**parts, **rest, "loss": parts["loss"] + rest["loss"]}

    def recordable(self, model: nn.Module, images: Tensor, labels: Tensor) -> Parts:
        """All but the cut pass, whose shapes change from step to step."""
        output = all_gather(model(images), len(labels))
        if self.penalty is None:
            loss = self.task_loss(output, images, labels)
            return {"loss": loss, "task": loss, **self._about(output, images, labels)}
        output, masks = output
        task = self.task_loss(output, images, labels)
        penalty, parts = self.penalty(masks, labels)
        if self.rise is not None:
            penalty = self.rise.share * penalty
            parts = {**parts, "penalty_share": self.rise.share}
        if self.cut_pass is not None:
            self.cut_pass.observe(masks, labels)
        return {
            "loss": task + penalty,
            "task": task,
            **parts,
            **_mask_health(masks),
            **self._about(output, images, labels),
        }

    @torch.no_grad()
    def _about(self, output: Any, images: Tensor, labels: Tensor) -> Parts:
        """What is no part of the loss."""
        about = {"train_accuracy": _accuracy(output, labels)}
        if isinstance(self.task_loss, Distillation):
            about[LABEL_LOSS] = cross_entropy(output[0], images, labels)
        return about

    def rest(self, model: nn.Module, images: Tensor, labels: Tensor) -> Parts:
        """The cut pass of the batch that `recordable` has seen."""
        assert self.cut_pass is not None
        loss = self.cut_pass(images, labels)
        return {"loss": loss, "cut_loss": loss}


def make_task(
    method: Objective,
    settings: Any,
    family: Family,
    labels: Tensor,
    device: torch.device,
    teacher: nn.Module | None = None,
    cut_pass: ScheduledCutPass | None = None,
) -> Task:
    """The task of a cell; with a `teacher`, the classification loss is DeiT's distillation.

    Args:
        settings: the method's section of params.
        labels: (N,) of the training images.

    Raises:
        ParamsError: a penalty that remembers steps, and has no state_dict or load_state_dict.
    """
    task_loss = cross_entropy if teacher is None else Distillation(teacher)
    if method.make is None:
        return Task(task_loss)
    warmup = settings.warmup if isinstance(settings, ObjectiveParams) else None
    rise = None if warmup is None else Rise(warmup.of(family), device)
    penalty = method.make(settings, family)
    if hasattr(penalty, "begin") and not isinstance(penalty, Remembers):
        raise ParamsError(
            f"{method.name}: its penalty has begin; accepted: with state_dict and load_state_dict"
        )
    return Task(task_loss, penalty, method.remedy, rise, cut_pass, guess_loss(labels))


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
            target = all_gather(self.teacher(images), len(labels)).float().log_softmax(1)
        cls, dist = (logits.float() for logits in output)
        divergence = sum(
            F.kl_div(logits.log_softmax(1), target, reduction="batchmean", log_target=True)
            for logits in (cls, dist)
        )
        return 0.5 * F.cross_entropy(cls, labels) + 0.25 * divergence


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
