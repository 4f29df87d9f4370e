"""Stage finetune: train a module on the images of its classes (paper section 4.5)."""

from __future__ import annotations

from nemo.cells import Cell, Layout
from nemo.config import Params
from nemo.distributed import main_only
from nemo.files import new_folder, write_csv, write_json
from nemo.module.files import load, save
from nemo.pipeline.inputs import images
from nemo.settings import flat
from nemo.training.finetune import finetune


def run(params: Params, cell: Cell, subset: str, layout: Layout) -> None:
    """Save the fine-tuned module, its history and its validation figures. Of several processes each
    calls this, and the main one writes.

    Raises:
        ArtefactError: there is no module to fine-tune, or it is damaged.
        ValueError: a new head is asked for, and the module does not know its head.
    """
    data, source = images(params, cell.dataset, layout), layout.module(cell, subset)
    module = load(source)
    assert module.classes is not None, source
    own, family = params.for_method(cell.method), module.info["family"]
    history, metrics = finetune(
        module,
        data.restrict(module.classes),
        family,
        own,
        cell.seed,
        f"{cell.name} {subset}",
        heads=module.info["heads"],
    )
    with main_only(new_folder(layout.finetuned(cell, subset))) as folder:
        if folder is not None:
            made = module.info["settings"] | flat({"finetune": own.finetune}, family)
            save(module.cpu(), folder, {"finetuned": metrics, "settings": made})
            write_csv(folder / "history.csv", history)
            write_json(folder / "metrics.json", metrics)
