"""Stage decompose: cut the module of a class subset out of a trained cell (paper section 4.4)."""

from __future__ import annotations

from typing import Any

from safetensors.torch import save_file

from nemo.calibration import AS_CUT, batch_norms, recalibrate_bn, training_batches
from nemo.cells import Cell, Layout
from nemo.config import Params
from nemo.cut import DecomposedModule, decompose
from nemo.data import parse_subset, read_meta
from nemo.device import resolve_device
from nemo.evaluation.modular import load_class_masks, load_for_cuts
from nemo.files import new_folder, read_json, writing
from nemo.masking.class_masks import retention_rate
from nemo.masking.generators import Modular
from nemo.masking.sites import head_names
from nemo.models import family_of
from nemo.module.files import save
from nemo.module.program import file_name
from nemo.pipeline.inputs import images
from nemo.settings import flat
from nemo.trained import load_cell, weights_sha256


def run(params: Params, cell: Cell, subset: str, layout: Layout) -> DecomposedModule:
    """Decompose the trained cell for the classes of `subset`; save the module, and return it.

    BatchNorms have the statistics that stage masks has for such a module, else the trained ones.
    Where params ask for it, they are then estimated anew on the subset's training images. The
    certificate is of the cut before that, whose statistics are saved beside the module.
    """
    data, trained = read_meta(layout.data(cell.dataset)), layout.train(cell)
    own = params.for_method(cell.method)
    modular = load_cell(trained)
    assert isinstance(modular, Modular), cell.name
    classes = parse_subset(params.text_of(subset), data["classes"])
    parent = weights_sha256(trained)
    chosen = load_class_masks(layout.masks(cell), modular.layers, parent).select(classes)
    for_cuts = load_for_cuts(modular, layout.masks(cell), len(data["classes"]))
    if for_cuts is not None:
        modular = for_cuts.ready(modular, classes)
    module = decompose(modular, chosen)
    heads = head_names(modular.model, len(data["classes"]))
    made = read_json(layout.masks(cell) / "metrics.json")["masks"]
    about: dict[str, Any] = {
        "cell": cell.name,
        "class_names": [data["classes"][c] for c in classes],
        "family": family_of(cell.model, modular.model),
        "heads": [file_name(name) for name in heads],
        "nrr": round(retention_rate(chosen), 6),
        "parent_sha256": parent,
        "preprocessing": {key: data[key] for key in ("mean", "std", "size")},
        "settings": {f"masks.{key}": value for key, value in made.items()},
        "subset": subset,
    }
    norms = batch_norms(module)
    if own.decompose.recalibrate_bn and norms:
        batch_size, device = own.finetune.batch_size, resolve_device(params.device)
        part = images(params, cell.dataset, layout).restrict(classes)
        recalibrate_bn(module.to(device), training_batches(part, batch_size, device, cell.seed))
        module.cpu()
    about["settings"] |= flat({"decompose": own.decompose}, about["family"])
    with new_folder(layout.module(cell, subset)) as folder:
        save(module, folder, about)
        if module.info.get("recalibrated_bn"):
            with writing(folder / AS_CUT):
                save_file(norms, folder / AS_CUT)
    return module
