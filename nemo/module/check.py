"""What a module is proved on: random images in float64, and the error of a failed proof (ours)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BATCHES = (1, 3)
SEED = 20250805


class ExactnessError(ArithmeticError):
    """The module does not compute what its masked parent computes."""


def logits_of(
    model: Callable[[Tensor], Tensor], input_size: tuple[int, ...], classes: list[int] | None = None
) -> Tensor:
    """What `model` says of the images of the check, in batches of 1 and 3: float64 (4, classes)."""
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(sum(BATCHES), *input_size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in torch.split(images, list(BATCHES))])
    return logits if classes is None else logits[..., classes]
