"""The class masks of a modular model and the metrics of them (paper sections 4.3 and 5.1)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo.files import new_folder, read_json, write_json, writing
from nemo.masking.class_masks import (
    ClassMasks,
    cohesion,
    coupling,
    coupling_matrix,
    mask_frequency,
    masks_from_frequency,
    retention_rate,
    sample_bits,
)
from nemo.masking.generators import Modular


def measure_masks(
    modular: Modular,
    batches: Iterable[tuple[Tensor, Tensor]],
    threshold: float,
    out: Path,
    parent_sha256: str,
) -> None:
    """Write the class masks of `modular` over `batches`, and their metrics, to the folder `out`.

    `parent_sha256` is that of the weights, kept so that nothing else is cut with these masks. One
    pass over the images. The samples' bits, which cohesion needs, are kept eight to a byte.
    """
    packed: list[tuple[np.ndarray, Tensor]] = []

    def remember() -> Iterable[tuple[dict[str, Tensor], Tensor]]:
        for bits, labels in sample_bits(modular, batches):
            row = torch.cat(list(bits.values()), 1).cpu().numpy()
            packed.append((np.packbits(row, axis=1), labels.cpu()))
            yield bits, labels

    masks = masks_from_frequency(mask_frequency(remember()), threshold)
    with new_folder(out) as folder:
        file = folder / "masks.safetensors"
        with writing(file):
            save_file({layer: mask.contiguous() for layer, mask in masks.items()}, file)
        metrics = {**_metrics(masks, packed, threshold), "parent_sha256": parent_sha256}
        write_json(folder / "metrics.json", metrics)


def load_class_masks(folder: Path, layers: Iterable[str], parent_sha256: str) -> ClassMasks:
    """The class masks of a `measure_masks` folder, in the order of `layers`.

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
        masks = load_file(file)
        return ClassMasks({layer: masks[layer] for layer in layers}, {})
    except (SafetensorError, KeyError):
        raise ValueError(f"{file}: damaged; run `nemo masks` again") from None


def _metrics(
    masks: ClassMasks, packed: list[tuple[np.ndarray, Tensor]], threshold: float
) -> dict[str, Any]:
    labels = torch.cat([label for _, label in packed])
    every = np.concatenate([row for row, _ in packed])
    neurons = sum(mask.shape[1] for mask in masks.values())
    one = {"all": torch.cat(list(masks.values()), 1)}
    per_class = [
        cohesion({"all": _unpack(every[labels.numpy() == c], neurons)}, labels[labels == c], one)
        for c in range(masks.num_classes)
    ]
    return {
        "class_nrr": one["all"].double().mean(1).tolist(),
        "cohesion": float(np.nanmean(per_class)),
        "coupling": coupling(masks),
        "coupling_matrix": coupling_matrix(masks).tolist(),
        "layers": [
            {
                "dead": masks.dead.get(layer, []),
                "kept": mask.sum(1).tolist(),
                "layer": layer,
                "neurons": mask.shape[1],
            }
            for layer, mask in masks.items()
        ],
        "neurons": neurons,
        "nrr": retention_rate(masks),
        "threshold": threshold,
    }


def _unpack(rows: np.ndarray, neurons: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(rows, axis=1, count=neurons)).bool()
