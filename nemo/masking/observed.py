"""What a selector of class masks may look at: a modular model and the training data (ours)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo.masking.class_masks import sample_bits
from nemo.masking.generators import Modular


class Observed:
    """A trained modular model on its training data, plain and in order.

    Attributes:
        modular: the model, on the device of the batches.
        batches: (inputs, labels (B,)); may be run through any number of times.
    """

    def __init__(self, modular: Modular, batches: Iterable[tuple[Any, Tensor]]) -> None:
        self.modular = modular
        self.batches = batches
        self._packed: list[tuple[np.ndarray, Tensor]] = []

    def bits(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """({layer: bool (B, N_l)}, labels (B,)) of every batch: which neurons each sample has on.

        One pass over the data, of which the bits are kept, eight to a byte.
        """
        packed: list[tuple[np.ndarray, Tensor]] = []
        for bits, labels in sample_bits(self.modular, self.batches):
            row = torch.cat(list(bits.values()), 1).cpu().numpy()
            packed.append((np.packbits(row, axis=1), labels.cpu()))
            yield bits, labels
        self._packed = packed

    def samples_of(self, label: int) -> Tensor:
        """The bits of all samples of a class: bool (S, K), layer after layer."""
        if not self._packed:
            for _ in self.bits():
                pass
        neurons = sum(self.modular.layers.values())
        rows = np.concatenate([row[labels.numpy() == label] for row, labels in self._packed])
        return torch.from_numpy(np.unpackbits(rows, axis=1, count=neurons)).bool()
