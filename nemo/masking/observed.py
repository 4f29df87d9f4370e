"""What a selector of class masks may look at: a modular model and the training data (ours)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from nemo.masking.class_masks import ClassMasks, sample_bits
from nemo.masking.generators import Modular, as_modular
from nemo.masking.selectors import SELECTORS
from nemo.signature import evaluating

T = TypeVar("T")


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
        self._known: dict[str, Any] = {}

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """What `compute` gives, computed the first time only: the same images may be asked for
        masks of several sizes."""
        if name not in self._known:
            self._known[name] = compute()
        found: T = self._known[name]
        return found

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


def class_masks(
    modular: Modular,
    loader: Iterable[tuple[Any, Tensor]],
    threshold: float | None = None,
    *,
    selector: str = "frequency",
    **settings: Any,
) -> ClassMasks:
    """The neurons that each class uses; by default those on for most of its samples (section 4.3).

    In eval mode. `frequency` takes one pass.

    Args:
        modular: from `nemo.modularize`; trained, for the selector `frequency`. `taylor` and
            `activation` look at the model alone, such as one that was trained elsewhere.
        loader: batches of (inputs, labels), the inputs a tensor, or a tuple or dict of them; every
            label from 0 to the largest must occur. Use the training data, without augmentation.
        threshold: of `frequency`: fraction of a class's samples, in (0, 1]; 0.9 by default.
        selector: frequency, taylor, activation, or one that a plugin registered.
        settings: those of the selector, such as `keep=0.3` of taylor: the share of each layer's
            neurons that a class keeps.

    Warns:
        UserWarning: the model has classes above the largest label: they get no masks.

    Raises:
        ValueError: no modular model, no such selector or setting, no batches of (inputs, labels),
            a label that is no class of the model, or a class without samples.
    """
    if threshold is not None or selector == "frequency":
        settings["threshold"] = 0.9 if threshold is None else threshold
    return choose(Observed(as_modular(modular), loader), selector, settings)


def choose(observed: Observed, selector: str, settings: Mapping[str, Any]) -> ClassMasks:
    """The class masks of a selector, given by its name and its settings.

    Raises:
        ValueError: no such selector or setting; what the selector raises.
    """
    chosen = SELECTORS.named(selector)
    try:
        params = chosen.params.model_validate(settings)
    except ValidationError as error:
        first, accepted = error.errors()[0], ", ".join(chosen.params.model_fields)
        raise ValueError(
            f"{selector}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}; "
            f"its settings: {accepted}"
        ) from None
    masks = chosen.choose(observed, params)
    observed.once("unseen", lambda: _check_classes(observed.modular, masks.num_classes))
    return masks


def _check_classes(modular: Modular, seen: int) -> None:
    """Warn of the model's classes above the largest label, and refuse labels above those."""
    takes, like = modular.takes, next(modular.parameters())
    with evaluating(modular), torch.no_grad():
        logits = takes.run(modular.model, takes.lowest(1, like))
    if logits.ndim != 2:
        return
    if seen > logits.shape[1]:
        raise ValueError(f"labels hold {seen - 1}; accepted: 0..{logits.shape[1] - 1}")
    if seen < logits.shape[1]:
        last = logits.shape[1] - 1
        which = f"class {last}" if seen == last else f"classes {seen}..{last}"
        warnings.warn(f"no sample of {which} of the model: no masks of them", stacklevel=6)
