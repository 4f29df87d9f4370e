"""What a module is proved on: random inputs in float64, and the error of a failed proof (ours)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemo.signature import Signature

BATCHES = (1, 3)
SEED = 20250805
Run = Callable[[Sequence[Tensor]], Tensor]


class ExactnessError(ArithmeticError):
    """The module does not compute what its masked parent computes."""


def batches(takes: Signature, dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    """The inputs of the check, in the order that a model takes them: batches of 1 and 3."""
    pieces = [torch.split(x, list(BATCHES)) for x in takes.draw(sum(BATCHES), SEED, dtype)]
    return [list(batch) for batch in zip(*pieces, strict=True)]


def logits_of(run: Run, takes: Signature, classes: list[int] | None = None) -> Tensor:
    """What is said of the inputs of the check: float64 (4, ..., classes).

    Args:
        run: of a model it is `partial(takes.run, model)`.
    """
    with torch.no_grad():
        logits = torch.cat([run(batch) for batch in batches(takes)])
    return logits if classes is None else logits[..., classes]
