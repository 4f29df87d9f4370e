"""Neurons against whole attention heads and MLP blocks, at equal size (ours).

`neurons` is the module at a threshold of the class masks. `heads` keeps heads (their q, k and v)
and the hidden layers of MLPs whole or not at all: in the order of the share of their neurons that
the class masks keep, each is added while the module has at most the parameters of `neurons`.
Layers that write to the residual stream stay whole. BatchNorms have the statistics that stage masks
has for such modules, if any, as the modules of stage decompose.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

import torch
from torch import Tensor

from nemo.alternatives.rows import Row, kept_rows, tuned
from nemo.cells import Cell, Layout
from nemo.config import Params
from nemo.cost import count_parameters
from nemo.cut import DecomposedModule, decompose
from nemo.data import Batches, Prepared, parse_subset
from nemo.device import resolve_device
from nemo.evaluation.modular import FOR_CUTS, load_class_masks, load_for_cuts
from nemo.masking.class_masks import SubsetMasks, mask_frequency, masks_from_frequency, sample_bits
from nemo.masking.generators import Modular
from nemo.trained import WEIGHTS, load_cell, weights_sha256

Part = dict[str, slice]  # {layer: its neurons}


def granularity(params: Params, cell: Cell, data: Prepared, layout: Layout) -> list[Row]:
    """Two rows for each of `params.granularity`'s subsets and thresholds, one where not a single
    head fits; none for a model without attention heads.

    Args:
        params: those of the cell's method.

    Raises:
        OSError, ValueError: the trained cell or its class masks are missing or damaged.
    """
    asked, device = params.granularity, resolve_device(params.device)
    modular = load_cell(layout.train(cell))
    assert isinstance(modular, Modular), cell.name
    attention = _attention(modular)
    if not attention:
        return []
    kept = layout.masks(cell)
    load_class_masks(kept, modular.layers, weights_sha256(layout.train(cell)))  # checks whose
    for_cuts = load_for_cuts(modular, kept, len(data.classes))

    @cache
    def frequency() -> dict[str, Tensor]:  # one pass, and none where all rows are kept
        images = Batches(data.splits["train"], data.mean, data.std, 256, device=device)
        found = mask_frequency(sample_bits(modular.to(device), images))
        modular.cpu()
        return found

    def measure(threshold: float, subset: str) -> list[Row]:
        classes = parse_subset(params.text_of(subset), data.classes)
        masks = masks_from_frequency(frequency(), threshold).select(classes)
        ready = for_cuts.ready(modular, classes) if for_cuts else modular
        neurons = decompose(ready, masks)
        heads = _heads(ready, masks, attention, count_parameters(neurons))
        rows = []
        for name, module in (("neurons", neurons), ("heads", heads)):
            if module is None:
                continue
            row = tuned(module, params, cell, data, subset, name)
            named = {"subset": subset, "threshold": threshold, "granularity": name}
            rows.append({**named, **row})
        return rows

    made: list[Row] = []
    files = [layout.train(cell) / WEIGHTS, *([kept / FOR_CUTS] if for_cuts else [])]
    with kept_rows("granularity", params, cell, data, files) as keep:
        for threshold in asked.thresholds:
            for subset in asked.subsets:
                made += keep(f"{subset} {threshold}", partial(measure, threshold, subset))
    return made


def _attention(modular: Modular) -> dict[str, int]:
    """{layer of q: its number of heads} of every masked attention."""
    found: dict[str, int] = {}
    for layer in modular.layers:
        name, _, leaf = layer.rpartition(".")
        if leaf == "q" and {f"{name}.k", f"{name}.v"} <= modular.layers.keys():
            heads = getattr(modular.model.get_submodule(name), "num_heads", None)
            if isinstance(heads, int):
                found[layer] = heads
    return found


def _heads(
    modular: Modular, masks: SubsetMasks, attention: dict[str, int], budget: int
) -> DecomposedModule | None:
    """The module of whole parts with at most `budget` parameters; None where not one part fits."""
    whole = {layer: torch.ones_like(mask) for layer, mask in masks.items()}
    parts = sorted(_parts(masks, attention), key=lambda part: -_kept(masks, part))
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
    return best


def _parts(masks: SubsetMasks, attention: dict[str, int]) -> Iterator[Part]:
    for layer, mask in masks.items():
        if layer in attention:
            wide = len(mask) // attention[layer]
            for head in range(attention[layer]):
                neurons = slice(head * wide, (head + 1) * wide)
                yield {f"{layer.removesuffix('q')}{name}": neurons for name in "qkv"}
        elif layer.endswith(".mlp.fc1"):
            yield {layer: slice(0, len(mask))}


def _kept(masks: SubsetMasks, part: Part) -> float:
    """The share of a part's neurons that the masks keep."""
    kept: list[Tensor] = [masks[layer][neurons].float() for layer, neurons in part.items()]
    return torch.cat(kept).mean().item()
