"""T5: neurons against whole attention heads and MLP blocks, at equal size.

`neurons` is NeMo's module at a threshold of the class masks. `heads` keeps heads (their q, k and v)
and the hidden layers of MLPs whole or not at all: in the order of the share of their neurons that
the class masks keep, each is added while the module has at most the parameters of `neurons`.
Layers that write to the residual stream stay whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.baselines import nemo_cell, tuned
from benchmarks.study.plan import PAIRS, Unit
from nemo.cells import Layout
from nemo.config import Params, VitShape
from nemo.cost import count_parameters
from nemo.cut import DecomposedModule, decompose
from nemo.data import Batches, Prepared, parse_subset
from nemo.device import resolve_device
from nemo.masking.class_masks import SubsetMasks, mask_frequency, masks_from_frequency, sample_bits
from nemo.masking.generators import Modular
from nemo.trained import load_cell

THRESHOLDS = (0.5, 0.9)
SUBSETS = (*PAIRS, "all")
Part = dict[str, slice]  # {layer: its neurons}


def granularity(
    params: Params, unit: Unit, data: Prepared, layout: Layout
) -> Iterator[tuple[Path, Callable[[], list[dict[str, Any]]]]]:
    """A file for each subset and threshold, and what makes its rows, one of each granularity."""
    for threshold in THRESHOLDS:
        for subset in SUBSETS:
            file = layout.root / "granularity" / f"{subset}-{threshold:g}.json"
            yield file, partial(_measure, params, unit, data, layout, subset, threshold)


def _measure(
    params: Params, unit: Unit, data: Prepared, layout: Layout, subset: str, threshold: float
) -> list[dict[str, Any]]:
    device = resolve_device(params.device)
    modular = load_cell(layout.train(nemo_cell(unit, data)))
    shape = params.architecture.of(unit.model)
    assert isinstance(modular, Modular)
    assert isinstance(shape, VitShape), unit.model
    images = Batches(data.splits["train"], data.mean, data.std, 256, device=device)
    frequency = mask_frequency(sample_bits(modular.to(device), images))
    masks = masks_from_frequency(frequency, threshold).select(parse_subset(subset, data.classes))
    neurons = decompose(modular.cpu(), masks)
    heads = _heads(modular, masks, shape.heads, count_parameters(neurons))
    rows = []
    for name, module in (("neurons", neurons), ("heads", heads)):
        made = tuned(module, params, unit, data, subset, f"{unit.name} {subset} {name}")
        named = {"subset": subset, "threshold": threshold, "granularity": name}
        rows.append({**named, **made})
    return rows


def _heads(modular: Modular, masks: SubsetMasks, heads: int, budget: int) -> DecomposedModule:
    """The module of whole parts with at most `budget` parameters."""
    whole = {layer: torch.ones_like(mask) for layer, mask in masks.items()}
    parts = sorted(_parts(masks, heads), key=lambda part: -_kept(masks, part))
    for part in parts:
        for layer in part:
            whole[layer][:] = False
    best: DecomposedModule | None = None
    for part in parts:
        larger = {layer: mask.clone() for layer, mask in whole.items()}
        for layer, neurons in part.items():
            larger[layer][neurons] = True
        module = decompose(modular, SubsetMasks(larger, masks.classes))
        if count_parameters(module) <= budget:
            whole, best = larger, module
    if best is None:
        raise ValueError(f"no head or MLP fits into {budget} parameters")
    return best


def _parts(masks: SubsetMasks, heads: int) -> Iterator[Part]:
    for layer, mask in masks.items():
        if layer.endswith(".attn.q"):
            wide = len(mask) // heads
            for head in range(heads):
                neurons = slice(head * wide, (head + 1) * wide)
                yield {f"{layer.removesuffix('q')}{name}": neurons for name in "qkv"}
        elif layer.endswith(".mlp.fc1"):
            yield {layer: slice(0, len(mask))}


def _kept(masks: SubsetMasks, part: Part) -> float:
    """The share of a part's neurons that the masks keep."""
    kept: list[Tensor] = [masks[layer][neurons].float() for layer, neurons in part.items()]
    return torch.cat(kept).mean().item()
