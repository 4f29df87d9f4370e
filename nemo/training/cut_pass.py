"""Train as you cut: a second pass under the mask that a module of some classes would have (ours).

Training sees a soft mask of each sample; a module has one binary mask for all. So beside the usual
step a random subset S of the classes is drawn, and the batch's images of S run through the base
model under the mask that a cut for S would give now:

    u_S = OR over c in S of [f_c >= threshold]
    loss += weight * CE(logits[S] under u_S, labels)

f_c is the frequency of class c's bits, a running average over the batches in which c occurs. u_S is
a constant of the step: what it costs teaches the weights, not the generators. BatchNorm uses the
statistics of these images and leaves its running ones alone. It runs in the last epochs only: a
network that still learns its task loses by it, and a few epochs are enough.

Shapes: B images of the whole batch, b of this process, C classes, K neurons of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nemo.data.batches import share
from nemo.data.subsets import draw_subset
from nemo.distributed import all_gather, rank_and_world_size
from nemo.masking.generators import Masks, Modular
from nemo.masking.hooks import acting
from nemo.masking.objectives import CutPassParams


class CutPass:
    """The loss of the cut pass, and what it remembers from step to step.

    Args:
        layers: {masked layer: N_l}, of the modular model.
        epochs: of the whole training.
        seed: the subsets are a function of it, the epoch and the step.
    """

    def __init__(
        self,
        params: CutPassParams,
        layers: Mapping[str, int],
        classes: int,
        epochs: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.params = params
        self.first = 0 if params.last is None else epochs - max(1, round(params.last * epochs))
        self.layers = dict(layers)
        self.seed = seed
        self.epoch = self.step = 0
        self.active = params.after == self.first == 0
        # masks start almost fully on
        self.frequency = torch.ones(classes, sum(layers.values()), device=device)

    def before_epoch(self, epoch: int, learning: int) -> None:
        """Prepare for an epoch, the first being 0, `learning` epochs after the task loss has left
        chance."""
        self.epoch, self.step = epoch, 0
        self.active = learning >= self.params.after and epoch >= self.first

    def state_dict(self) -> dict[str, Any]:
        return {"frequency": self.frequency}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.frequency = state["frequency"].to(self.frequency)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The weighted loss of this step, a scalar; 0 in steps without a cut pass.

        Args:
            images: (b, ...).
            labels: (B,).
        """
        self.step += 1
        nothing = torch.zeros((), device=self.frequency.device)
        if not self.active or self.step % self.params.every:
            return nothing
        subset = self._draw().to(labels.device)
        chosen = torch.isin(labels, subset)
        if int(chosen.sum()) < 2:  # BatchNorm needs two images
            return nothing
        modular = getattr(model, "module", model)  # DDP's, where there are several processes
        assert isinstance(modular, Modular)
        mine = chosen[share(len(labels), rank_and_world_size())]
        union = {layer: on[None].to(images) for layer, on in self.union(subset).items()}
        with (
            _batch_statistics(modular),
            acting(modular.model, modular.sites, union, lambda output, mask, _: output * mask),
        ):
            own = modular.model(images[mine])
        logits = torch.stack(own).mean(0) if isinstance(own, tuple) else own
        whole = logits.new_zeros(len(mine), logits.shape[1])
        whole[mine] = logits
        logits = all_gather(whole, len(labels))[chosen][:, subset].float()
        targets = (labels[chosen][:, None] == subset).int().argmax(1)
        return self.params.weight * F.cross_entropy(logits, targets)

    @torch.no_grad()
    def observe(self, masks: Masks, labels: Tensor) -> None:
        """Move the frequency of each class that occurs towards that of this batch."""
        bits = (torch.cat([masks[layer] for layer in self.layers], 1) > 0).float()
        every = torch.arange(len(self.frequency), device=labels.device)
        belongs = (labels == every[:, None]).float()
        count = belongs.sum(1, keepdim=True)
        seen = belongs @ bits / count.clamp(min=1)
        self.frequency.lerp_(seen, self.params.rate * (count > 0).float())

    def _draw(self) -> Tensor:
        """The subset of this step, in ascending order."""
        mixed = np.random.SeedSequence([self.seed, self.epoch, self.step])
        random = np.random.default_rng(mixed)
        return torch.tensor(draw_subset(random, len(self.frequency), self.params.sizes))

    def union(self, subset: Tensor) -> Masks:
        """u_S as {layer: (N_l,)} of 0 and 1. As in a cut, a class keeps a neuron in each layer:
        its most frequent one, where none reaches the threshold."""
        found = {}
        rows = self.frequency[subset].split(list(self.layers.values()), 1)
        for layer, frequency in zip(self.layers, rows, strict=True):
            most = frequency == frequency.amax(1, keepdim=True)
            on = frequency >= self.params.threshold
            found[layer] = torch.where(on.any(1, keepdim=True), on, most).any(0)
        return found


@contextmanager
def _batch_statistics(modular: Modular) -> Iterator[None]:
    """BatchNorms in training do not take part of what they see into their running statistics."""
    norms = [
        module
        for module in modular.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
