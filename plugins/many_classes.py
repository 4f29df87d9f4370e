"""A loss on masks for many classes: prototypes, and a budget in place of a fixed alpha (trial).

The contrastive loss compares the samples of a batch, which has no second one of most of hundreds of
classes. Here each class has a prototype in each layer, the running average of its masks, and with s
the cosine of sample i's mask to it

    contrast = mean over layers and i of CE(s_i / tau, class of i)

`groups` makes G groups of classes of equal size, whose prototypes are alike, and gives the paper's
loss those in place of classes: a group shares neurons, and a batch has some of each, however many
classes there are. The groups follow the prototypes, by k-means with balanced sizes, a step a batch.

`keep` asks each sample for at most this share of the neurons, by a Lagrange
multiplier that rises while the bits (mask > 0) are more and falls while they are fewer:

    loss += multiplier * sum over layers of N_l / K * (sum m)^2 / (N_l * sum m^2)

The last factor is the share that is on where a mask is binary, and does not change with its scale.

Shapes: B samples, C classes, N_l neurons of a layer, K of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nemo.fields import Family, NonNegative, PerFamily, Positive, Share
from nemo.masking.losses import contrastive_loss
from nemo.masking.objectives import ObjectiveParams, Parts, objective

EPSILON = 1e-12
BLUR = 0.05  # of the cosines by which classes are grouped


class PrototypeParams(ObjectiveParams):
    alpha: PerFamily[NonNegative]
    tau: Positive
    rate: Share = 0.2  # at which prototypes follow the batches
    contrast: Literal["batch"] | None = None  # the paper's, between samples, in place of prototypes
    groups: Annotated[int, Field(ge=2)] | None = None  # the paper's, between samples of groups
    keep: Share | None = None
    climb: Positive = 0.01  # of the multiplier, per step and share of the neurons


class Prototypes:
    """The penalty, and what it remembers from step to step."""

    def __init__(self, params: PrototypeParams, family: Family) -> None:
        self.params = params
        self.alpha = params.alpha.of(family)

    def begin(self, layers: Mapping[str, int], classes: int, device: torch.device) -> None:
        self.means = {
            layer: torch.zeros(classes, count, device=device) for layer, count in layers.items()
        }
        self.seen = torch.zeros(classes, 1, dtype=torch.bool, device=device)
        self.multiplier = torch.zeros((), device=device)
        count, generator = self.params.groups or 0, torch.Generator().manual_seed(0)
        self.centres = torch.randn(count, sum(layers.values()), generator=generator).to(device)

    def state_dict(self) -> dict[str, Tensor]:
        means = {f"mean.{layer}": mean for layer, mean in self.means.items()}
        return {**means, "seen": self.seen, "multiplier": self.multiplier, "centres": self.centres}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, value in self.state_dict().items():
            value.copy_(state[name])

    def __call__(self, masks: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Parts]:
        with torch.autocast(labels.device.type, enabled=False):
            masks = {layer: mask.float() for layer, mask in masks.items()}
            if self.params.contrast is None:
                self._follow(masks, labels)
            if self.params.groups is not None and self.params.groups < len(self.seen):
                contrast = contrastive_loss(masks, self._groups()[labels], self.params.tau)
            elif self.params.contrast is None and self.params.groups is None:
                contrast = self._contrast(masks, labels)
            else:
                contrast = contrastive_loss(masks, labels, self.params.tau)
            parts = {"contrast": contrast}
            loss = self.alpha * contrast
            if self.params.keep is not None:
                self._climb(masks, self.params.keep)
                loss = loss + self.multiplier * _share(masks)
                parts["multiplier"] = self.multiplier.clone()
        return loss, parts

    @torch.no_grad()
    def _follow(self, masks: Mapping[str, Tensor], labels: Tensor) -> None:
        """Move the prototypes of the classes that occur; the first time, all the way."""
        classes = torch.arange(len(self.seen), device=labels.device)
        belongs = (labels == classes[:, None]).float()
        count = belongs.sum(1, keepdim=True)
        rate = torch.where(self.seen, self.params.rate, 1.0) * (count > 0)
        for layer, mask in masks.items():
            self.means[layer].lerp_(belongs @ mask / count.clamp(min=1), rate)
        self.seen |= count > 0

    def _contrast(self, masks: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        prototypes = {layer: _unit(mean) for layer, mean in self.means.items()}
        left_out = (~self.seen).T.expand(len(labels), -1)
        losses = []
        for layer, mask in masks.items():
            cosines = _unit(mask) @ prototypes[layer].T
            logits = (cosines / self.params.tau).masked_fill(left_out, -torch.inf)
            losses.append(F.cross_entropy(logits, labels))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _groups(self) -> Tensor:
        """int64 (C,): the group of each class; moves the centres of the groups a step."""
        means = torch.cat(list(self.means.values()), 1)
        means = F.normalize(means - means.mean(0), dim=1)
        plan = (means @ F.normalize(self.centres, dim=1).T / BLUR).exp()
        for _ in range(20):  # Sinkhorn: as many classes in each group, and each in one
            plan = plan / plan.sum(0)
            plan = plan / plan.sum(1, keepdim=True)
        groups = plan.argmax(1)
        every = torch.arange(len(self.centres), device=groups.device)
        belongs = (groups == every[:, None]).float()
        count = belongs.sum(1, keepdim=True)
        self.centres.lerp_(belongs @ means / count.clamp(min=1), 0.1 * (count > 0).float())
        return groups

    @torch.no_grad()
    def _climb(self, masks: Mapping[str, Tensor], keep: float) -> None:
        on = torch.cat([mask > 0 for mask in masks.values()], 1).float().mean()
        self.multiplier.add_(self.params.climb * (on - keep)).clamp_(min=0)


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays one, with gradient 0."""
    alive = rows.detach().amax(1, keepdim=True) > EPSILON
    return F.normalize(torch.where(alive, rows, 0.0), dim=1, eps=EPSILON)


def _share(masks: Mapping[str, Tensor]) -> Tensor:
    """(sum m)^2 / (N_l * sum m^2), weighted by N_l / K; the mean over samples."""
    parts = [mask.sum(1) ** 2 / (mask**2).sum(1).clamp(min=EPSILON) for mask in masks.values()]
    return torch.stack(parts).sum(0).mean() / sum(mask.shape[1] for mask in masks.values())


@objective(
    "prototypes",
    label="prototypes",
    section="prototypes",
    params=PrototypeParams,
    remedy=", a smaller prototypes.alpha or a larger prototypes.tau",
    pull="prototypes.alpha",
    colour="#CC79A7",
)
def prototypes(params: PrototypeParams, family: Family) -> Prototypes:
    return Prototypes(params, family)
