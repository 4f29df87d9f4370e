"""Measure one cell on the test images, once: its whole model and its modules (paper section 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo.calibration import AS_CUT
from nemo.cells import Cell, Layout
from nemo.config import EXTRAS, Params
from nemo.cost import count_flops, count_parameters
from nemo.data import Batches, Prepared, parse_subset
from nemo.device import resolve_device
from nemo.files import read_csv, read_json
from nemo.masking.generators import Modular
from nemo.models import family_of
from nemo.module.decomposed import DecomposedModule
from nemo.module.files import DESCRIPTION, WEIGHTS, load
from nemo.predict import accuracy, predict
from nemo.provenance import provenance
from nemo.results import FORMAT
from nemo.settings import differences, settings
from nemo.trained import ABOUT, load_cell, weights_sha256

Row = dict[str, Any]


def evaluate_cell(params: Params, cell: Cell, data: Prepared, layout: Layout) -> Row:
    """What `nemo.results` keeps of a cell: everything that tables, figures and MLflow show.

    Raises:
        FileNotFoundError: a stage has not run.
        ValueError: a module or masks are of other weights than the trained ones.
    """
    device, base = resolve_device(params.device), params.base_of(cell.method)
    trained = load_cell(layout.train(cell)).to(device)
    logits = predict(trained, _test(data, device))
    inner = (trained.model if isinstance(trained, Modular) else trained).cpu()
    stated = settings(params, cell, family_of(cell.model, inner))
    about = read_json(layout.train(cell) / ABOUT)
    _check_made(about["settings"], stated, layout.train(cell), "train")
    masks = read_json(layout.masks(cell) / "metrics.json") if base.modular else None
    if masks is not None:
        own = {f"masks.{key}": value for key, value in masks["masks"].items()}
        _check_made(own, stated, layout.masks(cell), "masks")
    metrics = read_json(layout.train(cell) / "metrics.json") | {
        "accuracy": accuracy(*logits),
        "flops": count_flops(inner, torch.zeros(1, 3, *data.size)),
        "parameters": count_parameters(inner),
    }
    classes = {name: parse_subset(text, data.classes) for name, text in params.subsets.items()}
    return {
        "format": FORMAT,
        "profile": params.profile,
        "cell": {"dataset": cell.dataset, "model": cell.model, "method": cell.method,
                 "seed": cell.seed},
        "base": base.name,
        "family": family_of(cell.model, inner),
        "params": stated,
        "data": _about(data),
        "made": {"trained": about["made"], "evaluated": provenance(device)},
        "metrics": metrics | (_of_masks(masks) if masks else {}),
        "subsets": {name: accuracy(*logits, classes=own) for name, own in classes.items()},
        "history": read_csv(layout.train(cell) / "history.csv"),
        "masks": masks,
        "modules": [
            _module_row(cell, subset, own, data, layout, device, stated)
            for subset, own in (classes.items() if base.modular else ())
        ],
        **{
            extra: read_json(layout.extra(cell, extra))
            for extra in EXTRAS
            if cell.method in getattr(params, extra).of
        },
    }  # fmt: skip


def _of_masks(masks: Row) -> Row:
    return {
        **{key: masks[key] for key in ("nrr", "cohesion", "coupling", "neurons")},
        "layers": len(masks["layers"]),
        "dead_layers": sum(bool(layer["dead"]) for layer in masks["layers"]),
    }


def _check_made(made: Row, stated: Row, folder: Path, command: str, *more: str) -> None:
    """Raise ValueError where a file is of other params than those that would be stated, in the
    sections that it names and `more`."""
    sections = {*more, *(key.split(".")[0] for key in made)}
    now = {key: value for key, value in stated.items() if key.split(".")[0] in sections}
    for line in differences(made, now)[:1]:
        raise ValueError(f"{folder}: {line}; run `nemo {command}` again")


def _module_row(
    cell: Cell,
    subset: str,
    classes: list[int],
    data: Prepared,
    layout: Layout,
    device: torch.device,
    stated: Row,
) -> Row:
    test = _test(data.restrict(classes), device)
    weights = weights_sha256(layout.train(cell))
    as_cut = _module(layout.module(cell, subset), "decompose", weights, stated)
    row = {}
    if as_cut.info.get("recalibrated_bn"):
        row["accuracy_step0_bn"] = accuracy(*predict(as_cut.to(device), test))
        before = load_file(layout.module(cell, subset) / AS_CUT)
        as_cut.load_state_dict(as_cut.state_dict() | before)
    folder = layout.finetuned(cell, subset)
    tuned = _module(folder, "finetune", weights, stated)
    return {
        "subset": subset,
        "classes": classes,
        **row,
        "accuracy_step0": accuracy(*predict(as_cut.to(device), test)),
        "accuracy": accuracy(*predict(tuned.to(device), test)),
        "nrr": as_cut.info["nrr"],
        "parameters": as_cut.report["parameters"],
        "bytes": sum((folder / name).stat().st_size for name in (WEIGHTS, DESCRIPTION)),
        "flops": as_cut.report["flops"],
        "certificate": as_cut.certificate["error"],
        "vacuous": as_cut.certificate["vacuous"],
        "blocked": len(as_cut.report["blocked"]),
        "history": read_csv(folder / "history.csv"),
    }


def _module(folder: Path, command: str, weights: str, stated: Row) -> DecomposedModule:
    """The module in `folder`, which must have been cut from the cell's present weights, and made
    with the params that are stated."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no module here; run `nemo {command}` first")
    module = load(folder)
    if module.info.get("parent_sha256") != weights:
        raise ValueError(f"{folder}: a module of other weights; run `nemo {command}` again")
    _check_made(module.info["settings"], stated, folder, command, "decompose")
    return module


def _about(data: Prepared) -> Row:
    return {
        "name": data.name,
        "title": data.title,
        "classes": data.classes,
        "counts": {name: len(split.labels) for name, split in data.splits.items()},
        "size": data.size,
        "sha256": data.sha256,
    }


def _test(data: Prepared, device: torch.device) -> Batches:
    return Batches(data.splits["test"], data.mean, data.std, 256, device=device)
