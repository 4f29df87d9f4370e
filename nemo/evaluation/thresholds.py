"""The class masks' figures at other thresholds of the frequency rule (ours)."""

from __future__ import annotations

from typing import Any

from nemo.cells import Cell, Layout
from nemo.config import Params
from nemo.data import Batches, Prepared
from nemo.device import resolve_device
from nemo.evaluation.modular import cohesion_of
from nemo.masking.class_masks import (
    coupling,
    mask_frequency,
    masks_from_frequency,
    retention_rate,
)
from nemo.masking.generators import Modular
from nemo.masking.observed import Observed
from nemo.trained import load_cell


def thresholds(params: Params, cell: Cell, data: Prepared, layout: Layout) -> list[dict[str, Any]]:
    """NRR, cohesion and coupling at each of `params.thresholds.values`, from one pass over the
    training images."""
    device = resolve_device(params.device)
    modular = load_cell(layout.train(cell)).to(device)
    assert isinstance(modular, Modular), cell.name
    images = Batches(data.splits["train"], data.mean, data.std, 256, device=device)
    observed = Observed(modular, images)
    frequency = mask_frequency(observed.bits())
    rows = []
    for threshold in params.thresholds.values:
        masks = masks_from_frequency(frequency, threshold)
        rows.append(
            {
                "threshold": threshold,
                "nrr": retention_rate(masks),
                "cohesion": cohesion_of(masks, observed),
                "coupling": coupling(masks),
            }
        )
    return rows
