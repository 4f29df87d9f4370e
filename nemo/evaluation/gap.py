"""The mask gap: what accuracy a module loses before fine-tuning, and what wins it back (ours).

The modular model multiplies neurons by soft masks of each sample; a module has one binary mask for
all. On validation images, with the logits restricted to the subset: `soft` is the modular model,
`binary` the module as cut, `mean` has each kept neuron scaled by its mask's mean over the subset's
training images instead of 1, `low threshold` keeps neurons that are on for half of a class's
samples, and `+ bn` re-estimates BatchNorm on these images. Statistics that stage masks has for all
cuts are those of `binary`; `mean` is to be like soft masks, and has the trained ones.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from nemo.calibration import recalibrate_bn, training_batches
from nemo.cells import Cell, Layout
from nemo.config import Params
from nemo.data import Batches, Prepared, parse_subset
from nemo.device import resolve_device
from nemo.evaluation.modular import load_class_masks, load_for_cuts
from nemo.masking.class_masks import mask_frequency, masks_from_frequency, sample_bits
from nemo.masking.constant import mean_scales
from nemo.masking.generators import Modular
from nemo.predict import accuracy, predict
from nemo.trained import load_cell, weights_sha256

LOW = 0.5


def gap(params: Params, cell: Cell, data: Prepared, layout: Layout) -> list[dict[str, Any]]:
    """A row of validation accuracies per subset; `params` are those of the cell's method.

    Raises:
        FileNotFoundError, ValueError: the cell or its class masks are missing or damaged.
    """
    device = resolve_device(params.device)
    modular = load_cell(layout.train(cell)).to(device)
    assert isinstance(modular, Modular), cell.name
    parent = weights_sha256(layout.train(cell))
    images = Batches(data.splits["train"], data.mean, data.std, 256, device=device)
    low = masks_from_frequency(mask_frequency(sample_bits(modular, images)), LOW)
    masks = {
        "": load_class_masks(layout.masks(cell), modular.layers, parent),
        ", low threshold": low,
    }
    for_cuts = load_for_cuts(modular, layout.masks(cell), len(data.classes))
    rows = []
    for subset, text in params.subsets.items():
        classes = parse_subset(text, data.classes)
        part = data.restrict(classes)
        train = training_batches(part, 256, device, cell.seed)
        validation = Batches(part.splits["val"], data.mean, data.std, 256, device=device)
        soft = mean_scales(modular, part)
        ready = for_cuts.ready(modular, classes) if for_cuts else modular
        row: dict[str, Any] = {"subset": subset, "soft": _accuracy(modular, validation, classes)}
        for threshold, of_classes in masks.items():
            binary = {layer: mask.float() for layer, mask in of_classes.select(classes).items()}
            mean = {layer: mask * soft[layer].cpu() for layer, mask in binary.items()}
            for name, network, scales in (("binary", ready, binary), ("mean", modular, mean)):
                model = copy.deepcopy(network).under(scales).eval()
                row[f"{name}{threshold}"] = _accuracy(model, validation, classes)
                recalibrate_bn(model, train)
                row[f"{name} + bn{threshold}"] = _accuracy(model, validation, classes)
        rows.append(row)
    return rows


def _accuracy(model: nn.Module, batches: Batches, classes: list[int]) -> float:
    """Of logits restricted to `classes`; the labels of the batches count within them."""
    logits, labels = predict(model, batches)
    return accuracy(logits[:, classes], labels)
