"""One JSON per data set and model: accuracies, sizes and FLOPs of its cells and modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemo.cells import MODULAR, Cell, Layout, cells
from nemo.config import Params
from nemo.cost import count_flops, count_parameters
from nemo.data import Batches, Prepared, parse_subset
from nemo.device import resolve_device
from nemo.files import read_json, write_json
from nemo.masking.generators import Modular
from nemo.module.files import DESCRIPTION, WEIGHTS, load
from nemo.module.program import DecomposedModule
from nemo.predict import accuracy, predict
from nemo.training.cell import load_cell, weights_sha256

Logits = tuple[Tensor, Tensor]


def evaluate_model(
    params: Params, dataset: str, model: str, data: Prepared, layout: Layout
) -> None:
    """Measure every cell and module that `params` list for `model`, on the test images, once."""
    device = resolve_device(params.device)
    rows: list[dict[str, Any]] = []
    modules: list[dict[str, Any]] = []
    standard: dict[int, tuple[Logits, dict[str, Any]]] = {}
    for cell in cells(params):
        if (cell.dataset, cell.model) != (dataset, model):
            continue
        trained = load_cell(layout.train(cell))
        logits = predict(trained.to(device), _test(data, device))
        row = _cell_row(cell, trained, logits, layout, data)
        rows.append(row)
        if cell.method == "standard":
            standard[cell.seed] = (logits, row)
        for subset in params.subsets if cell.method in MODULAR else ():
            baseline, parent = standard[cell.seed]
            modules.append(
                {
                    **_module_row(cell, subset, data, layout, device, parent),
                    "accuracy_standard": _restricted(baseline, data, subset),
                    "accuracy_modular": _restricted(logits, data, subset),
                }
            )
    about = {
        "name": data.name,
        "title": data.title,
        "classes": data.classes,
        "counts": {name: len(split.labels) for name, split in data.splits.items()},
        "size": data.size,
    }
    write_json(
        layout.evaluation(dataset, model),
        {"dataset": about, "model": model, "cells": rows, "modules": modules},
    )


def _cell_row(
    cell: Cell, trained: nn.Module, logits: Logits, layout: Layout, data: Prepared
) -> dict[str, Any]:
    base = trained.model if isinstance(trained, Modular) else trained
    metrics = read_json(layout.train(cell) / "metrics.json")
    row = {
        "method": cell.method,
        "seed": cell.seed,
        "accuracy": accuracy(*logits),
        "val_accuracy": metrics["val_accuracy"],
        "parameters": count_parameters(base),
        "generator_parameters": metrics["generator_parameters"],
        "flops": count_flops(base.cpu(), torch.zeros(1, 3, *data.size)),
    }
    if cell.method in MODULAR:
        masks = read_json(layout.masks(cell) / "metrics.json")
        row |= {key: masks[key] for key in ("nrr", "cohesion", "coupling")}
        row["layers"] = len(masks["layers"])
        row["dead_layers"] = sum(bool(layer["dead"]) for layer in masks["layers"])
    return row


def _module_row(
    cell: Cell,
    subset: str,
    data: Prepared,
    layout: Layout,
    device: torch.device,
    parent: dict[str, Any],
) -> dict[str, Any]:
    classes = parse_subset(subset, data.classes)
    test = _test(data.restrict(classes), device)
    weights = weights_sha256(layout.train(cell))
    as_cut = _module(layout.module(cell, subset), "decompose", weights)
    finetuned = layout.finetuned(cell, subset)
    tuned = _module(finetuned, "finetune", weights)
    parameters, flops = as_cut.report["parameters"], as_cut.report["flops"]
    return {
        "method": cell.method,
        "seed": cell.seed,
        "subset": subset,
        "classes": classes,
        "accuracy_step0": accuracy(*predict(as_cut.to(device), test)),
        "accuracy": accuracy(*predict(tuned.to(device), test)),
        "nrr": as_cut.info["nrr"],
        "parameters": parameters,
        "bytes": sum((finetuned / name).stat().st_size for name in (WEIGHTS, DESCRIPTION)),
        "flops": flops,
        "parameters_ratio": parameters / parent["parameters"],
        "flops_ratio": flops / parent["flops"],
        "certificate": as_cut.certificate["error"],
        "vacuous": as_cut.certificate["vacuous"],
        "blocked": len(as_cut.report["blocked"]),
    }


def _module(folder: Path, command: str, weights: str) -> DecomposedModule:
    """The module in `folder`, which must have been cut from the cell's present weights."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no module here; run `nemo {command}` first")
    module = load(folder)
    if module.info.get("parent_sha256") != weights:
        raise ValueError(f"{folder}: a module of other weights; run `nemo {command}` again")
    return module


def _test(data: Prepared, device: torch.device) -> Batches:
    return Batches(data.splits["test"], data.mean, data.std, 256, device=device)


def _restricted(logits: Logits, data: Prepared, subset: str) -> float:
    return accuracy(*logits, classes=parse_subset(subset, data.classes))
