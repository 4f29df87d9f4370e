"""From results to data frames: the numbers of every table, and metrics.json for DVC."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pandas as pd

from nemo.report.results import CellResult, Results
from nemo.report.table import MODULAR, MODULES, TABLES, Table

WHOLE = (
    *("seed", "epochs", "layers", "dead_layers", "neurons", "classes", "blocked"),
    *("parameters", "generator_parameters", "flops"),
)


def modular_rows(results: Results) -> list[dict[str, Any]]:
    """T1: one row per cell."""
    rows = []
    for result in results.cells:
        row = {name: result.metrics.get(name) for name in MODULAR.names} | _key(result)
        row["neurons"] = (result.masks or {}).get("neurons")
        row["epochs"] = len(result.history)
        if result.masks:
            lost = results.standard_accuracy(result.cell) - result.metrics["accuracy"]
            row["loss_points"] = 100 * lost
        rows.append(row)
    return rows


def module_rows(results: Results) -> list[dict[str, Any]]:
    """T2: one row per cell and subset."""
    rows = []
    for result in results.cells:
        for module in result.modules:
            row = {name: module.metrics.get(name) for name in MODULES.names} | _key(result)
            row["classes"] = len(module.metrics["classes"])
            rows.append(row)
    return rows


def _key(result: CellResult) -> dict[str, Any]:
    return asdict(result.cell)


def frames(results: Results) -> dict[str, pd.DataFrame]:
    """The data frame of each table, by the table's name."""
    rows = {"modular": modular_rows(results), "modules": module_rows(results)}
    return {table.name: _frame(table, rows[table.name]) for table in TABLES}


def _frame(table: Table, rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=table.names)
    for name in table.names:
        if name in WHOLE:
            frame[name] = pd.to_numeric(frame[name]).astype("Int64")  # an integer or nothing
        elif name not in table.key_names:
            frame[name] = frame[name].astype("float64")
    return frame


def csv_text(frame: pd.DataFrame) -> str:
    text: str = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return text


def history_frame(results: Results) -> pd.DataFrame:
    """Every cell's training curves in one tidy table."""
    shared = ["epoch", "loss", "train_accuracy", "val_accuracy", "mask_on"]
    rows = [
        {"cell": result.cell.name} | {name: epoch.get(name) for name in shared}
        for result in results.cells
        for epoch in result.history
    ]
    frame = pd.DataFrame(rows, columns=["cell", *shared])
    frame["epoch"] = frame["epoch"].astype("Int64")
    return frame


def summary(tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Five numbers per data set, model and method, for `dvc metrics show` and `dvc exp show`."""
    nested: dict[str, Any] = {}
    modules = tables["modules"]
    for key, rows in tables["modular"].groupby(["dataset", "model", "method"], sort=False):
        dataset, model, method = (str(part) for part in key)
        own = modules[
            (modules["dataset"] == dataset)
            & (modules["model"] == model)
            & (modules["method"] == method)
        ]
        numbers = {
            "accuracy": rows["accuracy"].mean(),
            "nrr": rows["nrr"].mean(),
            "coupling": rows["coupling"].mean(),
            "module_accuracy": own["accuracy"].mean(),
            "module_size": own["parameters_ratio"].mean(),
        }
        kept = {k: round(float(v), 4) for k, v in numbers.items() if not math.isnan(v)}
        nested.setdefault(dataset, {}).setdefault(model, {})[method] = kept
    return nested
