"""A modular model with one mask for all images: constants in place of its generators (ours)."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nemo.data import Batches, Prepared
from nemo.masking.generators import Modular
from nemo.signature import moved


@torch.inference_mode()
def mean_scales(modular: Modular, data: Prepared) -> dict[str, Tensor]:
    """{layer: (N_l,)}: each neuron's soft mask, averaged over the training images of `data`."""
    device = next(modular.parameters()).device
    batches = Batches(data.splits["train"], data.mean, data.std, 256, device=device)
    modular.eval()
    total: dict[str, Tensor] = {}
    count = 0
    for images, labels in batches:
        count += len(labels)
        for layer, mask in modular(images)[1].items():
            total[layer] = total.get(layer, torch.zeros_like(mask[0])) + mask.sum(0)
    return {layer: mask.clone() / count for layer, mask in total.items()}


@torch.no_grad()
def scaled(modular: Modular, scales: Mapping[str, Tensor]) -> nn.Module:
    """The base model with its masked neurons multiplied by constants, folded into the weights.

    Args:
        scales: {layer: (N_l,)} for every masked layer.

    Raises:
        ValueError: weights are computed, shared or absent, so that scaling them is not scaling
            neurons.
    """
    model = copy.deepcopy(modular.model).eval()
    for site in modular.sites:
        rows = slice(None) if site.norm else slice(site.start, site.stop)
        for parameter in model.get_submodule(site.norm or site.module).parameters(recurse=False):
            scale = scales[site.layer].to(parameter)
            parameter[rows] *= scale.view(-1, *(1,) * (parameter.ndim - 1))
    batch = moved(modular.takes.draw(2, 0), next(model.parameters()))
    expected = modular.takes.run(copy.deepcopy(modular).under(scales).eval(), batch)
    error = (modular.takes.run(model, batch) - expected).abs().max()
    if not error <= 1e-3 * expected.abs().max():
        raise ValueError("weights are computed, shared or absent: neurons cannot be scaled in them")
    return model
