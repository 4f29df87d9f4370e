"""Train as you cut: a second pass under the mask that a module of some classes would have (ours).

Training sees a soft mask of each sample; a module has one binary mask for all. So beside the usual
step a random subset S of the classes is drawn, and the batch's samples of S run through the base
model under the mask that a cut for S would give now:

    u_S = OR over c in S of [f_c >= threshold]
    loss += weight * CE(logits[S] under u_S, labels)

f_c is the frequency of class c's bits, a running average over the batches in which c occurs. u_S is
a constant of the step: what it costs teaches the weights, not the generators. BatchNorm uses the
statistics of these samples and leaves its running ones alone.

Shapes: B samples, C classes, K neurons of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nemo.data.subsets import draw_subset
from nemo.masking.generators import Masks, as_modular
from nemo.masking.hooks import acting
from nemo.masking.labels import check_labels
from nemo.signature import call, pick, rows


class CutPass:
    """The loss of the cut pass, and what it remembers from step to step.

    Call it once a step, with what the modular model was given and what it returned:

        logits, masks = modular(images)
        loss = ... + cut_pass(images, labels, masks)

    The last third of the epochs is enough: a network that still learns its task loses by it.

    Args:
        modular: from `nemo.modularize`, a classifier with logits (B, C).
        classes: C, at least 2.
        weight: of the loss.
        sizes: of the subsets; all classes together are always one more. Each is as likely.
        rate: at which frequencies follow the batches, in (0, 1].
        threshold: as for `nemo.class_masks`.
        seed: the subsets are a function of it and of the number of the step.

    Raises:
        ValueError: no modular model, or a number out of its range.
    """

    def __init__(
        self,
        modular: nn.Module,
        classes: int,
        *,
        weight: float = 1.0,
        sizes: Sequence[int] = (2, 3, 5),
        rate: float = 0.05,
        threshold: float = 0.9,
        seed: int = 0,
    ) -> None:
        self.modular = as_modular(modular)
        for name, count in (("classes", classes), *(("sizes", size) for size in sizes)):
            if count < 2:
                raise ValueError(f"{name}: {count}; accepted: 2 and above")
        for name, share in (("rate", rate), ("threshold", threshold)):
            if not 0 < share <= 1:
                raise ValueError(f"{name}: {share}; accepted: above 0, at most 1")
        if not weight > 0:
            raise ValueError(f"weight: {weight}; accepted: above 0")
        self.weight, self.sizes = weight, list(sizes)
        self.rate, self.threshold = rate, threshold
        self.seed, self.epoch, self.step = seed, 0, 0
        device = next(self.modular.parameters()).device
        # masks start almost fully on
        self.frequency = torch.ones(classes, sum(self.modular.layers.values()), device=device)

    def __call__(self, inputs: Any, labels: Tensor, masks: Masks) -> Tensor:
        """The weighted loss of this step, a scalar; 0 where the batch has less than two samples of
        the subset.

        Args:
            inputs: what the model was called with: a tensor (B, ...), a tuple or a dict of them.
            labels: (B,) in 0..C-1.
            masks: {layer: (B, N_l)}, as the modular model returned them.

        Raises:
            ValueError: labels that are no classes, or masks of positions.
        """
        check_labels(labels, masks, len(self.frequency))
        self.frequency = self.frequency.to(labels.device)  # the model may have moved since
        self.observe(masks, labels)
        self.step += 1
        subset = self.draw().to(labels.device)
        chosen = torch.isin(labels, subset)
        if int(chosen.sum()) < 2:  # BatchNorm needs two samples
            return torch.zeros((), device=labels.device)
        return self.loss(self.logits(rows(inputs, chosen), subset), labels[chosen], subset)

    @torch.no_grad()
    def observe(self, masks: Masks, labels: Tensor) -> None:
        """Move the frequency of each class that occurs towards that of this batch."""
        bits = (torch.cat([masks[layer] for layer in self.modular.layers], 1) > 0).float()
        every = torch.arange(len(self.frequency), device=labels.device)
        belongs = (labels == every[:, None]).float()
        count = belongs.sum(1, keepdim=True)
        seen = belongs @ bits / count.clamp(min=1)
        self.frequency.lerp_(seen, self.rate * (count > 0).float())

    def draw(self) -> Tensor:
        """The subset of this step, in ascending order."""
        mixed = np.random.SeedSequence([self.seed, self.epoch, self.step])
        random = np.random.default_rng(mixed)
        return torch.tensor(draw_subset(random, len(self.frequency), self.sizes))

    def union(self, subset: Tensor) -> Masks:
        """u_S as {layer: (N_l,)} of 0 and 1. As in a cut, a class keeps a neuron in each layer:
        its most frequent one, where none reaches the threshold."""
        found, layers = {}, self.modular.layers
        frequencies = self.frequency[subset].split(list(layers.values()), 1)
        for layer, frequency in zip(layers, frequencies, strict=True):
            most = frequency == frequency.amax(1, keepdim=True)
            on = frequency >= self.threshold
            found[layer] = torch.where(on.any(1, keepdim=True), on, most).any(0)
        return found

    def logits(self, inputs: Any, subset: Tensor) -> Tensor:
        """(B, C) of the base model under u_S; the mean of a pair, as DeiT has in training."""
        modular, like = self.modular, next(self.modular.parameters())
        union = {layer: on[None].to(like) for layer, on in self.union(subset).items()}
        with (
            _batch_statistics(modular),
            acting(modular.model, modular.sites, union, lambda output, mask, _: output * mask),
        ):
            own = pick(call(modular.model, inputs), modular.output)
        return torch.stack(own).mean(0) if isinstance(own, tuple) else own

    def loss(self, logits: Tensor, labels: Tensor, subset: Tensor) -> Tensor:
        """The weighted cross-entropy among the classes of the subset."""
        targets = (labels[:, None] == subset).int().argmax(1)
        return self.weight * F.cross_entropy(logits[:, subset].float(), targets)

    def state_dict(self) -> dict[str, Any]:
        """What must be known to go on with a training."""
        return {"frequency": self.frequency, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.frequency, self.step = state["frequency"].to(self.frequency), state["step"]


@contextmanager
def _batch_statistics(modular: nn.Module) -> Iterator[None]:
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
