"""When the cut pass runs in a training of the pipeline, and how processes share it (ours).

`nemo.masking.cut_pass` has the formula. It runs in the last epochs only: a network that still
learns its task loses by it, and a few epochs are enough.

Shapes: B images of the whole batch, b of this process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo.data.batches import share
from nemo.distributed import all_gather, rank_and_world_size
from nemo.masking.cut_pass import CutLoss
from nemo.masking.generators import Modular
from nemo.masking.objectives import CutPassParams


class ScheduledCutPass(CutLoss):
    """A cut pass in every so many steps of the last epochs, all processes on one subset.

    Args:
        epochs: of the whole training.
        seed: the subsets are a function of it, the epoch and the step.
    """

    def __init__(
        self, params: CutPassParams, modular: Modular, classes: int, epochs: int, seed: int
    ) -> None:
        super().__init__(
            modular,
            classes,
            weight=params.weight,
            sizes=params.sizes,
            rate=params.rate,
            threshold=params.threshold,
            seed=seed,
        )
        self.every, self.after = params.every, params.after
        self.first = 0 if params.last is None else epochs - max(1, round(params.last * epochs))
        self.active = self.after == self.first == 0

    def before_epoch(self, epoch: int, learning: int) -> None:
        """Prepare for an epoch, the first being 0, `learning` epochs after the task loss has left
        chance."""
        self.epoch, self.step = epoch, 0
        self.active = learning >= self.after and epoch >= self.first

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """The weighted loss of this step, a scalar; 0 in steps without a cut pass.

        Args:
            images: (b, ...).
            labels: (B,), whose masks `observe` has seen.
        """
        self.step += 1
        nothing = torch.zeros((), device=self.frequency.device)
        if not self.active or self.step % self.every:
            return nothing
        subset = self.draw().to(labels.device)
        chosen = torch.isin(labels, subset)
        if int(chosen.sum()) < 2:  # BatchNorm needs two images
            return nothing
        mine = chosen[share(len(labels), rank_and_world_size())]
        own = self.under_cut(images[mine], subset)
        if isinstance(own, tuple):  # DeiT's two heads in training
            own = torch.stack(own).mean(0)
        whole = own.new_zeros(len(mine), own.shape[1])
        whole[mine] = own
        return self.loss(all_gather(whole, len(labels))[chosen], labels[chosen], subset)
