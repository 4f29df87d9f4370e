"""A small tree of finished results: plausible numbers, each a plain function of its cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo.cells import Cell, cells
from nemo.config import Params, check_params
from nemo.models.registry import family_named
from nemo.results import FORMAT, result_file, times_file
from nemo.settings import settings

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


COST = {"standard": 0.0, "mwt": 0.02, "nemo": 0.01}  # in accuracy
MACHINE = {"device": "cpu", "machine": "an abacus", "revision": "c0ffee", "threads": 1}


def make_params(**changes: Any) -> Params:
    return check_params(SETTINGS | changes)


def accuracy(cell: Cell, base: str = "") -> float:
    """Test accuracy of a fake cell: 0.95 less 0.02 (mwt) or 0.01 (nemo), 0.004 more for seed 1."""
    return round(0.95 - COST[base or cell.method] + 0.004 * cell.seed, 6)


def make_results(root: Path, params: Params, title: str = "Tiny & real") -> None:
    """Write a file of results for every cell of `params`."""
    for cell in cells(params):
        write_json(result_file(root, params.profile, cell), result(params, cell, title))


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def edit(path: Path, group: str, row: int | None = None, **changes: Any) -> None:
    """Change one entry of a file of results, or one of its rows."""
    content = json.loads(path.read_text())
    (content[group] if row is None else content[group][row]).update(changes)
    write_json(path, content)


def result(params: Params, cell: Cell, title: str = "Tiny & real") -> dict[str, Any]:
    """What the evaluation of a cell leaves; plausible, and a plain function of the cell."""
    base, family = params.base_of(cell.method), family_named(cell.model)
    metrics: dict[str, Any] = {
        "accuracy": accuracy(cell, base.name),
        "val_accuracy": 0.96 - COST[base.name],
        "parameters": 704_000,
        "flops": 18_000_000,
        "epochs": 3,
        "generator_parameters": 350_000 if base.modular else 0,
    }
    if base.modular:
        layers = len(LAYERS[cell.model])
        metrics |= {"nrr": 0.2 + 0.02 * cell.seed, "cohesion": 0.9, "coupling": 0.3}
        metrics |= {"layers": layers, "dead_layers": cell.seed, "neurons": 40 * layers}
    loss = 0.01 if base.modular else -0.01
    return {
        "format": FORMAT,
        "profile": params.profile,
        "cell": {"dataset": cell.dataset, "model": cell.model, "method": cell.method,
                 "seed": cell.seed},
        "base": base.name,
        "family": family,
        "params": settings(params, cell, family),
        "data": {
            "name": cell.dataset,
            "title": title,
            "classes": CLASSES,
            "counts": {"train": 1234, "val": 100, "test": 200},
            "size": [16, 16],
            "sha256": "5a1e",
        },
        "made": {"trained": MACHINE, "evaluated": MACHINE},
        "metrics": metrics,
        "subsets": {s: 0.98 - loss - 0.01 * len(classes_of(s)) for s in params.subsets},
        "history": _history(cell, base.name, base.modular),
        "masks": _masks(cell) if base.modular else None,
        "modules": [_module(cell, base.name, s) for s in params.subsets] if base.modular else [],
    }  # fmt: skip


def classes_of(subset: str) -> list[int]:
    return [0, 1] if subset == "0+1" else [0, 1, 2, 3]


def _module(cell: Cell, base: str, subset: str) -> dict[str, Any]:
    classes = classes_of(subset)
    ratio = 0.05 * len(classes) + (0.03 if base == "mwt" else 0)
    return {
        "subset": subset,
        "classes": classes,
        "accuracy_step0": 0.5 + 0.1 * cell.seed,
        "accuracy": 0.985 - 0.01 * len(classes),
        "nrr": 0.1 * len(classes),
        "parameters": round(704_000 * ratio),
        "bytes": 4 * round(704_000 * ratio),
        "flops": round(18_000_000 * (ratio + 0.1)),
        "certificate": 2.5e-14,
        "vacuous": False,
        "blocked": 0,
        "history": [
            {"epoch": 1, "loss": 0.5, "val_accuracy": 0.9},
            {"epoch": 2, "loss": 0.4, "val_accuracy": 0.97},
        ],
    }


def _history(cell: Cell, base: str, modular: bool) -> list[dict[str, float]]:
    rows = []
    for epoch in (1, 2, 3):
        rise = 0.2 / epoch
        row = {"epoch": epoch, "lr": 0.002 / epoch, "loss": 1 / epoch, "task": 0.8 / epoch}
        row |= {"train_accuracy": 0.97 - rise, "val_accuracy": 0.96 - COST[base] - rise}
        if modular:
            row["mask_on"] = 0.2 + rise
        rows.append(row)
    return rows


def extras(subsets: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the measurements that params may ask for besides."""
    ways = ("soft", "binary", "binary + bn", "mean, low threshold")
    other = {"accuracy": 0.9, "accuracy_step0": 0.5, "best_test_accuracy": 0.92}
    other |= {"parameters": 70_400, "flops": 900_000, "best_epoch": 1, "val_accuracy": 0.9}
    masks = {"nrr": 0.3, "cohesion": 0.8, "coupling": 0.4}
    return {
        "alternatives": [
            {"alternative": name, "subset": s, **other}
            for name in ("pruned", "standard-tuned")
            for s in subsets
        ],
        "budgets": [
            budget(s, name, equal, epochs)
            for s in subsets
            for equal in ("parameters", "flops")
            for name in ("module", "pruned", "taylor", "standard-tuned")
            for epochs in (0, 0.1, 1)
        ],
        "gap": [{"subset": s, **dict.fromkeys(ways, 0.7)} for s in subsets],
        "thresholds": [{"threshold": t, **masks} for t in (0.1, 0.5)],
        "granularity": [
            {"subset": s, "threshold": 0.5, "granularity": kind, **other}
            for s in subsets
            for kind in ("neurons", "heads")
        ],
    }


BUDGET = {"module": 0.9, "pruned": 0.8, "taylor": 0.85, "standard-tuned": 0.95}


def budget(subset: str, name: str, equal: str, epochs: float) -> dict[str, Any]:
    """A row of `budgets`: 1 % more for each epoch, 2 % less for `all`; the whole one is larger."""
    reached = BUDGET[name] + 0.01 * epochs - 0.02 * (subset == "all")
    large = 2 if name == "standard-tuned" else 1
    return {
        "subset": subset, "competitor": name, "equal": equal, "epochs": epochs, "lr": 0.001,
        "parameters": 70_400 * large, "flops": 900_000 * large, "accuracy": round(reached, 6),
        "val_accuracy": 0.9, "make_seconds": 0.5, "tune_seconds": 2.0 * epochs, "device": "cuda",
    }  # fmt: skip


def make_times(root: Path, params: Params, cell: Cell) -> None:
    """What `benchmarks.times` would leave of the cells of a model and seed."""
    latency = [
        {"method": m, "subset": s, "batch": batch, "ms": 2.0 * batch, "ratio": 0.5}
        for m in params.methods
        for s in ("all", *params.subsets)
        for batch in (1, 128)
    ]
    training = [{"method": m, "ms": 50.0, "ratio": 1.25, "peak_mb": 90.0} for m in params.methods]
    operations = [{"what": "decompose", "subset": s, "seconds": 0.5} for s in params.subsets]
    rows = {"latency": latency, "training": training, "operations": operations}
    write_json(times_file(root, params.profile, cell), rows)


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
