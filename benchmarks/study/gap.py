"""The mask gap: what accuracy a module loses before fine-tuning, and what wins it back.

The modular model multiplies neurons by soft masks of each sample; a module has one binary mask for
all. On validation images, with the logits restricted to the subset: `soft` is the modular model,
`binary` the module as cut, `mean` has each kept neuron scaled by its mask's mean over the subset's
training images instead of 1, `low threshold` keeps neurons that are on for half of a class's
samples, and `+ bn` re-estimates BatchNorm on these images.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from nemo.cells import Cell, Layout
from nemo.config import Params
from nemo.data import Batches, Prepared, parse_subset
from nemo.device import resolve_device
from nemo.masking.class_masks import mask_frequency, masks_from_frequency, sample_bits
from nemo.masking.generators import Modular
from nemo.predict import accuracy, predict
from nemo.trained import load_cell
from nemo.training.finetune import recalibrate_bn, training_batches

LOW = 0.5


def mask_gap(params: Params, cell: Cell, data: Prepared, layout: Layout) -> list[dict[str, Any]]:
    """A row of validation accuracies per subset."""
    device = resolve_device(params.device)
    modular = load_cell(layout.train(cell)).to(device)
    assert isinstance(modular, Modular)
    every = Batches(data.splits["train"], data.mean, data.std, 256, device=device)
    frequency = mask_frequency(sample_bits(modular, every))
    thresholds = {"": params.masks.threshold, ", low threshold": LOW}
    masks = {name: masks_from_frequency(frequency, t) for name, t in thresholds.items()}
    rows = []
    for subset in params.subsets:
        classes = parse_subset(subset, data.classes)
        part = data.restrict(classes)
        train = training_batches(part, 256, device, cell.seed)
        validation = Batches(part.splits["val"], data.mean, data.std, 256, device=device)
        soft = subset_means(params, modular, data, subset)
        row: dict[str, Any] = {"method": cell.method, "subset": subset}
        row["soft"] = _accuracy(modular, validation, classes)
        for threshold, of_classes in masks.items():
            binary = {layer: mask.float() for layer, mask in of_classes.select(classes).items()}
            mean = {layer: mask * soft[layer].cpu() for layer, mask in binary.items()}
            for name, scales in (("binary", binary), ("mean", mean)):
                model = scaled(modular, scales)
                row[f"{name}{threshold}"] = _accuracy(model, validation, classes)
                recalibrate_bn(model, train)
                row[f"{name} + bn{threshold}"] = _accuracy(model, validation, classes)
        rows.append(row)
    return rows


@torch.inference_mode()
def subset_means(
    params: Params, modular: Modular, data: Prepared, subset: str
) -> dict[str, Tensor]:
    """{layer: (N_l,)}: each neuron's soft mask, averaged over the subset's training images."""
    split = data.restrict(parse_subset(subset, data.classes)).splits["train"]
    batches = Batches(split, data.mean, data.std, 256, device=resolve_device(params.device))
    modular.eval()
    total: dict[str, Tensor] = {}
    count = 0
    for images, labels in batches:
        count += len(labels)
        for layer, mask in modular(images)[1].items():
            total[layer] = total.get(layer, torch.zeros_like(mask[0])) + mask.sum(0)
    return {layer: mask.clone() / count for layer, mask in total.items()}


@torch.no_grad()
def scaled(modular: Modular, scales: dict[str, Tensor]) -> nn.Module:
    """The base model with its masked neurons multiplied by constants, folded into the weights."""
    model = copy.deepcopy(modular.model).eval()
    for site in modular.sites:
        module = model.get_submodule(site.norm or site.module)
        scale = scales[site.layer].to(next(module.parameters()))
        rows = slice(None) if site.norm else slice(site.start, site.stop)
        for parameter in module.parameters(recurse=False):
            parameter[rows] *= scale.view(-1, *(1,) * (parameter.ndim - 1))
    return model


def _accuracy(model: nn.Module, batches: Batches, classes: list[int]) -> float:
    """Of logits restricted to `classes`; the labels of the batches count within them."""
    logits, labels = predict(model, batches)
    return accuracy(logits[:, classes], labels)
