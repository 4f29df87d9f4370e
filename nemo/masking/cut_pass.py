"""Train as you cut: a second pass under the mask that a module of some classes would have (ours).

Training sees a soft mask of each sample; a module has one binary mask for all. So beside the usual
step a random subset S of the classes is drawn, and the batch's samples of S run through the base
model under a mask as a cut for S would give it now:

    u_S = OR over c in S of [f_c >= threshold]
    loss += weight * CE(logits[S] under u_S, labels)

f_c is the frequency of class c's bits, a running average over the batches in which c occurs. Where
no neuron of a layer reaches the threshold, the most frequent one is on; a cut would lower the
threshold. u_S is a constant of the step: what it costs teaches the weights, not the generators.
BatchNorm uses the statistics of these samples and leaves its running ones alone.

Shapes: B samples, C classes, K neurons of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from nemo.data.subsets import draw_subset
from nemo.masking.generators import Masks, as_modular
from nemo.masking.hooks import acting
from nemo.masking.labels import check_labels, integer, integers
from nemo.signature import ACCEPTED, call, pick, rows

EPSILON = 1e-6  # an average of ones in float32 ends a little below 1


class CutLoss:
    """The formula, and what it remembers from step to step."""

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
        classes, self.sizes = integer("classes", classes, 2), integers("sizes", sizes, 2)
        for name, share in (("rate", rate), ("threshold", threshold)):
            if not 0 < share <= 1:
                raise ValueError(f"{name}: {share}; accepted: above 0, at most 1")
        if not (weight > 0 and isfinite(weight)):
            raise ValueError(f"weight: {weight}; accepted: finite numbers above 0")
        self.weight, self.rate, self.threshold = weight, rate, threshold
        self.seed, self.epoch, self.step = integer("seed", seed, 0), 0, 0
        device = next(self.modular.parameters()).device
        # masks start almost fully on
        self.frequency = torch.ones(classes, sum(self.modular.layers.values()), device=device)

    @torch.no_grad()
    def observe(self, masks: Masks, labels: Tensor) -> None:
        """Move the frequency of each class that occurs towards that of this batch.

        Args:
            masks: {layer: (B, N_l)}, as the modular model returned them.
            labels: (B,) in 0..C-1.
        """
        with torch.autocast(labels.device.type, enabled=False):  # bfloat16 counts to 256
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
        """u_S as {layer: (N_l,)} of bools."""
        found, layers = {}, self.modular.layers
        frequencies = self.frequency[subset].split(list(layers.values()), 1)
        for layer, frequency in zip(layers, frequencies, strict=True):
            most = frequency == frequency.amax(1, keepdim=True)
            on = frequency >= self.threshold - EPSILON
            found[layer] = torch.where(on.any(1, keepdim=True), on, most).any(0)
        return found

    def under_cut(self, inputs: Any, subset: Tensor) -> Any:
        """What the base model returns under u_S; of several outputs, the one that counts."""
        modular, like = self.modular, next(self.modular.parameters())
        union = {layer: on[None].to(like) for layer, on in self.union(subset).items()}
        with (
            _batch_statistics(modular),
            acting(modular.model, modular.sites, union, lambda output, mask, _: output * mask),
        ):
            return pick(call(modular.model, inputs), modular.output)

    def loss(self, logits: Tensor, labels: Tensor, subset: Tensor) -> Tensor:
        """The weighted cross-entropy among the classes of the subset, a scalar."""
        targets = (labels[:, None] == subset).int().argmax(1)
        return self.weight * F.cross_entropy(logits[:, subset].float(), targets)

    def state_dict(self) -> dict[str, Any]:
        """What must be known to go on with a training."""
        return {"frequency": self.frequency.clone(), "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError where it is that of other classes or another model."""
        shape, mine = tuple(state["frequency"].shape), tuple(self.frequency.shape)
        if shape != mine:
            raise ValueError(f"frequency has shape {shape}; accepted: (classes, neurons) {mine}")
        self.frequency.copy_(state["frequency"])
        self.step = state["step"]


class CutPass(CutLoss):
    """The cut pass in a training loop of your own; `help(nemo.masking.cut_pass)` has its formula.

    Call it once a step of training, in the last third of the epochs. A network that still learns
    its task loses by it. Do not call it to measure something: each call moves the frequencies.

        logits, masks = modular(images)
        loss = ... + cut_pass(images, labels, masks)

    It learns the frequencies in the steps that call it, and begins with all neurons on. In other
    steps, `cut_pass.observe(masks, labels)` may teach it, too. Each of several processes has a
    cut pass of its own, for its part of the batch. As some may skip a step, SyncBatchNorm, which
    waits for all of them, is not for it. Nor is activation checkpointing. What a layer besides
    BatchNorm and InstanceNorm remembers of its inputs, as spectral_norm does, it remembers of this
    pass, too.

    Args:
        modular: from `nemo.modularize`, a classifier with logits (B, C).
        classes: C, at least 2: those of the labels. The model may have further logits, as of
            classes without samples, which `nemo.class_masks` warns of; here they are left out.
        weight: of the loss.
        sizes: of the subsets; all classes together are always one more. Each is as likely. With
            many classes, small subsets are rare in a batch.
        rate: at which frequencies follow the batches, in (0, 1].
        threshold: as for `nemo.class_masks`.
        seed: the subsets are a function of it and of the number of the step.

    Raises:
        ValueError: no modular model, or a number out of its range.
    """

    def __call__(self, inputs: Any, labels: Tensor, masks: Masks) -> Tensor:
        """The weighted loss of this step, a scalar; 0 where the batch has less than two samples of
        the subset.

        Args:
            inputs: what the model was called with: a tensor (B, ...), a tuple or a dict of them.
            labels: (B,) in 0..C-1.
            masks: {layer: (B, N_l)}, as the modular model returned them.

        Raises:
            ValueError: inputs, labels and masks that do not fit together, labels that are no
                classes, masks of positions, or a model that returns no logits (B, C).
        """
        self._check(masks, labels)
        _check_inputs(inputs, labels)
        self._learn(masks, labels)
        labels = labels.long()
        self.step += 1
        subset = self.draw().to(labels.device)
        chosen = torch.isin(labels, subset)
        if int(chosen.sum()) < 2:  # BatchNorm needs two samples
            return 0 * next(self.modular.parameters()).sum()
        logits = self.under_cut(rows(inputs, chosen), subset)
        classes = len(self.frequency)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < classes:
            found = tuple(getattr(logits, "shape", ())) or type(logits).__name__
            raise ValueError(
                f"the model returns {found}; accepted: logits (B, {classes}), which "
                "nemo.modularize(..., output=) may name"
            )
        return self.loss(logits, labels[chosen], subset)

    def observe(self, masks: Masks, labels: Tensor) -> None:
        """Learn the frequencies from a step that does not call this.

        Args:
            masks: {layer: (B, N_l)}, as the modular model returned them.
            labels: (B,) in 0..C-1.

        Raises:
            ValueError: masks and labels that do not fit together or this cut pass.
        """
        self._check(masks, labels)
        self._learn(masks, labels)

    def _learn(self, masks: Masks, labels: Tensor) -> None:
        self.frequency = self.frequency.to(labels.device)  # the model may have moved since
        super().observe(masks, labels.long())

    def _check(self, masks: Masks, labels: Tensor) -> None:
        check_labels(labels, masks, len(self.frequency))
        for layer, neurons in self.modular.layers.items():
            if layer not in masks:
                raise ValueError(f"masks lack {layer!r}; accepted: those of the model")
            if masks[layer].shape[1] != neurons:
                raise ValueError(
                    f"masks[{layer!r}] has {masks[layer].shape[1]} columns; accepted: {neurons}"
                )


def _check_inputs(inputs: Any, labels: Tensor) -> None:
    tensors = inputs.values() if isinstance(inputs, Mapping) else inputs
    for tensor in [inputs] if isinstance(inputs, Tensor) else tensors:
        if not isinstance(tensor, Tensor) or tensor.shape[:1] != labels.shape:
            raise ValueError(f"inputs do not fit {len(labels)} labels; accepted: {ACCEPTED}")


@contextmanager
def _batch_statistics(modular: nn.Module) -> Iterator[None]:
    """Norms in training do not take part of what they see into their running statistics."""
    changes: list[tuple[nn.Module, str, Any]] = []
    for module in modular.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            changes.append((module, "track_running_stats", False))
        elif isinstance(module, _InstanceNorm) and module.track_running_stats:  # copies move
            changes += [
                (module, name, buffer.clone())
                for name in ("running_mean", "running_var")
                if (buffer := getattr(module, name)) is not None
            ]
    before = [getattr(module, name) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(changes, before, strict=True):
            setattr(module, name, value)
