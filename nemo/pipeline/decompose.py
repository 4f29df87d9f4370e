"""Cut the module of one class subset out of a trained cell (paper section 4.4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from nemo.cells import Cell
from nemo.cut import decompose
from nemo.data import parse_subset
from nemo.evaluation.modular import load_class_masks
from nemo.files import new_folder
from nemo.masking.class_masks import retention_rate
from nemo.masking.generators import Modular
from nemo.masking.sites import HEAD, find_sites
from nemo.models import family_of
from nemo.module.files import save
from nemo.training.cell import load_cell, weights_sha256


def cut_module(
    cell: Cell, subset: str, trained: Path, masks: Path, data: dict[str, Any], out: Path
) -> None:
    """Decompose the cell trained in the folder `trained` for `subset`; save the module to `out`.

    Args:
        data: the meta.json of the prepared data set.
    """
    modular = load_cell(trained)
    assert isinstance(modular, Modular), cell.name
    classes = parse_subset(subset, data["classes"])
    parent = weights_sha256(trained)
    chosen = load_class_masks(masks, modular.layers, parent).select(classes)
    module = decompose(modular, chosen)
    about = {
        "cell": cell.name,
        "class_names": [data["classes"][c] for c in classes],
        "family": family_of(cell.model, modular.model),
        "heads": _heads(modular.model, len(data["classes"])),
        "nrr": round(retention_rate(chosen), 6),
        "parent_sha256": parent,
        "preprocessing": {key: data[key] for key in ("mean", "std", "size")},
        "subset": subset,
    }
    with new_folder(out) as folder:
        save(module, folder, about)


def _heads(model: nn.Module, num_classes: int) -> list[str]:
    """What the module calls the classifier's last layers: one, or two in a distilled model."""
    return [
        site.module.replace(".", "_")
        for site in find_sites(model)
        if site.skip == HEAD and site.neurons == num_classes
    ]
