"""Stage masks: the neurons that each class uses (paper section 4.3)."""

from __future__ import annotations

from nemo.cells import Cell, Layout
from nemo.config import Params
from nemo.data import Batches
from nemo.device import resolve_device
from nemo.evaluation.modular import measure_masks
from nemo.masking.generators import Modular
from nemo.pipeline.inputs import images
from nemo.trained import load_cell, weights_sha256


def run(params: Params, cell: Cell, layout: Layout) -> None:
    """Choose class masks on the training images, plain and in order, and measure them."""
    data, device = images(params, cell.dataset, layout), resolve_device(params.device)
    trained = layout.train(cell)
    modular = load_cell(trained).to(device)
    assert isinstance(modular, Modular), cell.name
    batches = Batches(data.splits["train"], data.mean, data.std, 256, device=device)
    chosen = params.for_method(cell.method).masks
    measure_masks(modular, batches, chosen, layout.masks(cell), weights_sha256(trained))
