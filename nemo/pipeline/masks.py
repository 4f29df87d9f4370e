"""Stage masks: the neurons that each class uses (paper section 4.3)."""

from __future__ import annotations

from nemo.calibration import training_batches
from nemo.cells import Cell, Layout
from nemo.config import Params
from nemo.data import Batches
from nemo.device import resolve_device
from nemo.evaluation.modular import measure_masks
from nemo.for_cuts import DRAWS, BatchNormForCuts, bn_for_cuts
from nemo.masking.class_masks import ClassMasks
from nemo.masking.generators import Modular
from nemo.masking.objectives import CutPassParams
from nemo.pipeline.inputs import images
from nemo.trained import load_cell, weights_sha256


def run(params: Params, cell: Cell, layout: Layout) -> None:
    """Choose class masks on the training images, plain and in order, and measure them.

    Where params ask for it, BatchNorm's statistics for all cuts are estimated with them, so that
    cutting needs no image.
    """
    data, device = images(params, cell.dataset, layout), resolve_device(params.device)
    trained = layout.train(cell)
    modular = load_cell(trained).to(device)
    assert isinstance(modular, Modular), cell.name
    batches = Batches(data.splits["train"], data.mean, data.std, 256, device=device)
    own = params.for_method(cell.method)

    def for_cuts(masks: ClassMasks) -> BatchNormForCuts:
        section = own.section(params.base_of(cell.method).section)
        cut = getattr(section, "cut", None) or CutPassParams()
        mixed = training_batches(data, own.train.batch_size, device, cell.seed, steps=DRAWS)
        return bn_for_cuts(modular, masks, mixed, cut.sizes, seed=cell.seed)

    out, weights = layout.masks(cell), weights_sha256(trained)
    asked = for_cuts if own.masks.batch_norm else None
    measure_masks(modular, batches, own.masks, out, weights, asked)
