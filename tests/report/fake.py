"""A small tree of finished results: plausible numbers, each a plain function of its cell."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from nemo.cells import MODULAR, Cell, Layout, cells
from nemo.config import Params
from nemo.report.results import read_json

RECIPE = {"batch_size": 32, "optimizer": "adamw", "momentum": 0.9, "weight_decay": 0.0}
CLASSES = ["cat", "dog", "ship", "<b>frog</b>"]
SETTINGS: dict[str, Any] = {
    "profile": "fake",
    "datasets": ["tiny"],
    "models": ["resnet18", "vit_small"],
    "methods": ["standard", "mwt", "nemo"],
    "subsets": ["0+1", "all"],
    "seeds": [0, 1],
    "data": {"tiny": {"source": "digits", "size": 16}},
    "architecture": {"vit_small": {"dim": 64, "depth": 4, "heads": 4}, "resnet18": {"width": 0.25}},
    "train": RECIPE
    | {
        "epochs": 3,
        "lr": {"cnn": 0.002, "transformer": 0.001},
        "amp": False,
        "channels_last": True,
    },
    "loss": {"alpha": {"cnn": 2.0, "transformer": 0.2}, "tau": 0.2, "form": "equation"},
    "mwt": {"alpha": 0.5, "beta": 1.5},
    "masks": {"threshold": 0.9},
    "finetune": RECIPE | {"epochs": 2, "lr": 0.001, "head": "inherit", "recalibrate_bn": True},
}
LAYERS = {
    "resnet18": [f"layer{s}.{b}.conv{c}" for s in (1, 2, 3, 4) for b in (0, 1) for c in (1, 2)],
    "vit_small": [f"blocks.{b}.{part}" for b in (1, 2, 3) for part in ("q", "k", "v", "fc1")],
}


def make_params(**changes: Any) -> Params:
    return Params.model_validate(SETTINGS | changes)


def accuracy(cell: Cell) -> float:
    """Test accuracy of a fake cell: 0.95 less 0.02 (mwt) or 0.01 (nemo), 0.004 more for seed 1."""
    cost = {"standard": 0.0, "mwt": 0.02, "nemo": 0.01}[cell.method]
    return round(0.95 - cost + 0.004 * cell.seed, 6)


def make_results(root: Path, params: Params, title: str = "Tiny & real") -> None:
    """Write evaluation/ and runs/ for every cell of `params`."""
    layout = Layout(root)
    for dataset in params.datasets:
        about = {
            "name": dataset,
            "title": title,
            "classes": CLASSES,
            "counts": {"train": 1234, "val": 100, "test": 200},
            "size": [16, 16],
        }
        for model in params.models:
            own = [c for c in cells(params) if (c.dataset, c.model) == (dataset, model)]
            modular = [c for c in own if c.method in MODULAR]
            content = {
                "dataset": about,
                "model": model,
                "cells": [_cell(c) for c in own],
                "modules": [_module(c, s) for c in modular for s in params.subsets],
            }
            write_json(layout.evaluation(dataset, model), content)
            for cell in own:
                _runs(layout, cell, params)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def edit(path: Path, group: str, row: int, **changes: Any) -> None:
    """Change one entry of an evaluation file."""
    content = read_json(path, path.parent, "evaluate")
    content[group][row] |= changes
    write_json(path, content)


def _cell(cell: Cell) -> dict[str, Any]:
    row = {
        "method": cell.method,
        "seed": cell.seed,
        "accuracy": accuracy(cell),
        "val_accuracy": 0.96,
        "parameters": 704_000,
        "flops": 18_000_000,
        "generator_parameters": 0 if cell.method == "standard" else 350_000,
    }
    if cell.method in MODULAR:
        row |= {"nrr": 0.2 + 0.02 * cell.seed, "cohesion": 0.9, "coupling": 0.3}
        row |= {"layers": len(LAYERS[cell.model]), "dead_layers": cell.seed}
    return row


def _module(cell: Cell, subset: str) -> dict[str, Any]:
    classes = [0, 1] if subset == "0+1" else [0, 1, 2, 3]
    ratio = 0.05 * len(classes) + (0.03 if cell.method == "mwt" else 0)
    return {
        "method": cell.method,
        "seed": cell.seed,
        "subset": subset,
        "classes": classes,
        "accuracy_standard": 0.99 - 0.01 * len(classes),
        "accuracy_modular": 0.97 - 0.01 * len(classes),
        "accuracy_step0": 0.5 + 0.1 * cell.seed,
        "accuracy": 0.985 - 0.01 * len(classes),
        "nrr": 0.1 * len(classes),
        "parameters": round(704_000 * ratio),
        "flops": round(18_000_000 * (ratio + 0.1)),
        "parameters_ratio": round(ratio, 6),
        "flops_ratio": round(ratio + 0.1, 6),
        "certificate": 2.5e-14,
        "blocked": 0,
    }


def _runs(layout: Layout, cell: Cell, params: Params) -> None:
    train = layout.train(cell)
    base = {"standard": 0.0, "mwt": 0.02, "nemo": 0.01}[cell.method]
    rows = []
    for epoch in (1, 2, 3):
        rise = 0.2 / epoch
        row = {"epoch": epoch, "lr": 0.002 / epoch, "loss": 1 / epoch, "task": 0.8 / epoch}
        row |= {"train_accuracy": 0.97 - rise, "val_accuracy": 0.96 - base - rise}
        if cell.method in MODULAR:
            row["mask_on"] = 0.2 + rise
        rows.append(row)
    write_json(train / "metrics.json", {"val_accuracy": 0.96, "epochs": 3})
    _write_csv(train / "history.csv", rows)
    if cell.method not in MODULAR:
        return
    write_json(layout.masks(cell) / "metrics.json", _masks(cell))
    for subset in params.subsets:
        folder = layout.finetuned(cell, subset)
        write_json(folder / "module.json", {"subset": subset})
        write_json(folder / "metrics.json", {"val_accuracy": 0.97, "best_epoch": 2})
        (folder / "module.safetensors").write_bytes(b"weights")
        _write_csv(
            folder / "history.csv",
            [
                {"epoch": 1, "loss": 0.5, "val_accuracy": 0.9},
                {"epoch": 2, "loss": 0.4, "val_accuracy": 0.97},
            ],
        )


def _masks(cell: Cell) -> dict[str, Any]:
    size, count = 40, len(CLASSES)
    names = LAYERS[cell.model]
    layers = [
        {
            "layer": n,
            "neurons": size,
            "kept": [(7 * i + 11 * c) % size for c in range(count)],
            "dead": [1] if i == 3 else [],
        }
        for i, n in enumerate(names)
    ]
    matrix = [[1.0 if a == b else 0.1 * (a + b) for b in range(count)] for a in range(count)]
    return {
        "nrr": 0.2,
        "cohesion": 0.9,
        "coupling": 0.3,
        "threshold": 0.9,
        "neurons": size * len(names),
        "class_nrr": [0.2] * count,
        "coupling_matrix": matrix,
        "layers": layers,
    }


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
