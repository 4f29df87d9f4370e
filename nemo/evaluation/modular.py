"""The class masks of a modular model and the metrics of them (paper sections 4.3 and 5.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo.calibration import batch_norms
from nemo.files import new_folder, read_json, write_json, writing
from nemo.for_cuts import BatchNormForCuts
from nemo.masking.class_masks import (
    ClassMasks,
    cohesion,
    coupling_matrix,
    mean_of_pairs,
    retention_rate,
)
from nemo.masking.generators import Modular
from nemo.masking.observed import Observed
from nemo.masking.selectors import SELECTORS

if TYPE_CHECKING:
    from nemo.sections import MaskParams


FOR_CUTS = "batch_norm.safetensors"  # beside class masks: BatchNorms' statistics for all cuts
DRAWN = "drawn"  # its key of the classes of each draw


def measure_masks(
    modular: Modular,
    batches: Iterable[tuple[Tensor, Tensor]],
    params: MaskParams,
    out: Path,
    parent_sha256: str,
    for_cuts: Callable[[ClassMasks], BatchNormForCuts] | None = None,
) -> None:
    """Write the class masks of `modular` over `batches`, and their metrics, to the folder `out`;
    beside them what `for_cuts` gives, the BatchNorms' statistics for what is cut with these masks.

    `parent_sha256` is that of the weights, kept so that nothing else is cut with these masks. One
    pass over the images where the selector needs no more.
    """
    observed = Observed(modular, batches)
    masks = SELECTORS.named(params.selector).choose(observed, params)
    with new_folder(out) as folder:
        file = folder / "masks.safetensors"
        with writing(file):
            save_file({layer: _packed(mask) for layer, mask in masks.items()}, file)
        chosen = params.model_dump(exclude_none=True)
        metrics = {**_metrics(masks, observed), "masks": chosen, "parent_sha256": parent_sha256}
        write_json(folder / "metrics.json", metrics)
        if for_cuts and batch_norms(modular.model):
            found = for_cuts(masks)
            with writing(folder / FOR_CUTS):
                save_file({DRAWN: found.drawn, **found.statistics}, folder / FOR_CUTS)


def _packed(mask: Tensor) -> Tensor:
    """bool (C, N_l) -> uint8 (C, ceil(N_l / 8)), the first neuron in the highest bit."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=1))


def _unpacked(bits: Tensor, neurons: int) -> Tensor:
    if bits.dtype == torch.bool:  # as 0.2 wrote them, a byte each
        return bits
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=neurons)).bool()


def load_class_masks(folder: Path, layers: Mapping[str, int], parent_sha256: str) -> ClassMasks:
    """The class masks of a `measure_masks` folder, in the order of `layers` {layer: N_l}.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are damaged, or of other weights than `parent_sha256`.
    """
    file = folder / "masks.safetensors"
    if not file.exists():
        raise FileNotFoundError(f"{folder}: no class masks here; run `nemo masks` first")
    if read_json(folder / "metrics.json").get("parent_sha256") != parent_sha256:
        raise ValueError(f"{folder}: class masks of other weights; run `nemo masks` again")
    try:
        bits = load_file(file)
        masks = {layer: _unpacked(bits[layer], count) for layer, count in layers.items()}
        return ClassMasks(masks, {})
    except (SafetensorError, KeyError):
        raise ValueError(f"{file}: damaged; run `nemo masks` again") from None


def load_for_cuts(modular: Modular, folder: Path, classes: int) -> BatchNormForCuts | None:
    """The BatchNorms' statistics of a `measure_masks` folder, if that was to have some. Class masks
    of the same folder must have been loaded: these check whose they are.

    Raises:
        ValueError: they are missing or damaged, or of another network.
    """
    norms = batch_norms(modular.model)
    if not norms or not read_json(folder / "metrics.json")["masks"].get("batch_norm"):
        return None
    known = {k: (v.dtype, v.shape) for k, v in norms.items() if v.is_floating_point()}
    file = folder / FOR_CUTS
    try:
        statistics = load_file(file)
        found = BatchNormForCuts(statistics.pop(DRAWN), statistics)
        whose = {key: (value.dtype, value.shape[1:]) for key, value in statistics.items()}
        if whose != known or found.drawn.shape[1] != classes:
            raise ValueError("of another network")
    except (OSError, KeyError, SafetensorError, ValueError):
        raise ValueError(f"{file}: missing or damaged; run `nemo masks` again") from None
    return found


def cohesion_of(masks: ClassMasks, observed: Observed) -> float:
    """How alike the samples of a class are inside its class mask, without a pass over the images
    once their bits are there; see `nemo.masking.class_masks.cohesion`."""
    one = {"all": torch.cat(list(masks.values()), 1)}
    per_class = []
    for label in range(masks.num_classes):
        bits = observed.samples_of(label)
        per_class.append(cohesion({"all": bits}, torch.full((len(bits),), label), one))
    return float(np.nanmean(per_class))


def _metrics(masks: ClassMasks, observed: Observed) -> dict[str, Any]:
    one, similar = {"all": torch.cat(list(masks.values()), 1)}, coupling_matrix(masks)
    return {
        "class_nrr": (one["all"].sum(1).double() / one["all"].shape[1]).tolist(),
        "cohesion": cohesion_of(masks, observed),
        "coupling": mean_of_pairs(similar),
        "coupling_matrix": similar.tolist(),
        "layers": [
            {
                "dead": masks.dead.get(layer, []),
                "kept": mask.sum(1).tolist(),
                "layer": layer,
                "neurons": mask.shape[1],
            }
            for layer, mask in masks.items()
        ],
        "neurons": one["all"].shape[1],
        "nrr": retention_rate(masks),
    }
