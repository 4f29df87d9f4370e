"""Small files of results, and what the tests of MLflow ask its client."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo.cells import Cell, cells
from nemo.config import Params, check_params
from nemo.files import read_json, write_json
from nemo.results import result_file
from nemo.settings import settings
from nemo.tracking.store import DEFAULTS

QUICK = yaml.safe_load((Path(__file__).parents[1] / "profiles" / "quick.yaml").read_text())
CELL = Cell("digits", "resnet18", "nemo", 0)
FIGURES = {"accuracy", "parameters", "flops"}
SETTINGS = ("DVC_ROOT", "DVC_EXP_NAME", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", *DEFAULTS)
SHA256 = "5" * 64
MADE = {"revision": "0123456789ab", "torch": "2.14.1", "device": "cpu"}


def make_params(profile: str, tau: float = 0.2, **changes: Any) -> Params:
    """One model, two methods, two subsets, unless `changes` say otherwise."""
    small = {"models": ["resnet18"], "methods": ["standard", "nemo"], "subsets": ["0+1", "all"]}
    raw = {**copy.deepcopy(QUICK), **small, **changes, "profile": profile}
    raw["loss"]["tau"] = tau
    return check_params(raw, "params")


def history(cell: Cell, epochs: int, tau: float = 0.2) -> list[dict[str, float]]:
    """A row per epoch, with the columns that training writes."""
    rows = []
    for epoch in range(1, epochs + 1):
        rise = 0.2 / epoch
        row = {"epoch": epoch, "lr": 0.002 / epoch, "loss": 1 / epoch, "task": 0.8 / epoch}
        row |= {"train_accuracy": 0.97 - rise, "val_accuracy": 0.96 - rise}
        if cell.method != "standard":
            row |= {"contrast": tau / epoch, "mask_on": 0.2 + rise, "dead_rate": 0.0}
        rows.append(row)
    return rows


def write_results(root: Path, params: Params, epochs: int = 3, tuned: int = 2) -> None:
    """The file of every cell of `params`; `tuned` is the epochs of a module's fine-tuning."""
    for cell in cells(params):
        write_result(root, params, cell, epochs, tuned)


def write_result(root: Path, params: Params, cell: Cell, epochs: int = 3, tuned: int = 2) -> None:
    base, tau = params.base_of(cell.method), 0.2
    if base.name == "nemo":
        tau = params.for_method(cell.method).loss.tau
    family = "cnn" if cell.model == "resnet18" else "transformer"
    lost = 0.05 * abs(tau - 0.2) + (0.01 if base.modular else 0)
    metrics = {"accuracy": 0.95 - lost + 0.004 * cell.seed, "val_accuracy": 0.96, "epochs": epochs}
    metrics |= {"parameters": 704_000, "flops": 18_000_000, "generator_parameters": 0}
    if base.modular:
        metrics |= {"nrr": 0.2 + tau / 3, "cohesion": 0.9, "coupling": 0.3 - tau / 4}
        metrics |= {"layers": 20, "dead_layers": cell.seed, "neurons": 1184}
    modules = [_module(n, cell, subset, tuned) for n, subset in enumerate(params.subsets, 1)]
    content = {
        "format": 1, "profile": params.profile, "base": base.name, "family": family,
        "cell": dict(vars(cell)), "params": settings(params, cell, family),
        "data": {"name": cell.dataset, "title": "Tiny", "classes": list("0123456789"),
                 "counts": {}, "size": [16, 16], "sha256": SHA256},
        "made": {"trained": MADE, "evaluated": MADE}, "metrics": metrics,
        "subsets": dict.fromkeys(params.subsets, 0.97 - lost),
        "history": history(cell, epochs, tau),
        "masks": {"layers": [], "class_nrr": [], "coupling_matrix": []} if base.modular else None,
        "modules": modules if base.modular else [],
    }  # fmt: skip
    write_json(result_file(root, params.profile, cell), content)


def _module(number: int, cell: Cell, subset: str, epochs: int) -> dict[str, Any]:
    classes = list(range(10 if subset == "all" else 2 * number))
    return {
        "subset": subset, "classes": classes, "accuracy_step0": 0.5,
        "accuracy": 0.985 - 0.01 * number, "nrr": 0.1 * number, "parameters": 70_400 * number,
        "bytes": 300_000, "flops": 2_000_000 * number, "certificate": 2.5e-14, "vacuous": False,
        "blocked": 0, "history": history(cell, epochs),
    }  # fmt: skip


def edit(root: Path, params: Params, cell: Cell, **metrics: float) -> None:
    """Change figures of a cell's file."""
    path = result_file(root, params.profile, cell)
    content = read_json(path)
    content["metrics"] |= metrics
    write_json(path, content)


def fresh_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of MLflow or DVC from outside, and none that stays."""
    for name in (*SETTINGS, "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone
        monkeypatch.delenv(name)


def runs(client: Any, profile: str, role: str = "cell") -> list[Any]:
    experiment = client.get_experiment_by_name("nemo")
    if experiment is None:  # nothing was ever logged to this store
        return []
    wanted = f"tags.profile = '{profile}' and tags.role = '{role}'"
    return list(client.search_runs([experiment.experiment_id], wanted))


def curve(client: Any, run: Any, name: str) -> list[tuple[int, float]]:
    found = client.get_metric_history(run.info.run_id, name)
    return sorted((metric.step, metric.value) for metric in found)


def snapshot(client: Any, profile: str) -> list[Any]:
    every = [run for role in ("cell", "module", "former") for run in runs(client, profile, role)]
    return sorted(
        (r.info.run_id, r.info.end_time, sorted(r.data.tags.items()), sorted(r.data.metrics))
        for r in every
    )
