"""Published figures beside ours, only where both measure the same thing.

A row of published.csv stands beside one of ours when method, model, data set and metric are the
same and the metric is one of a class mask or module. Left out on purpose: the curves that the
authors log while training (per-batch statistics of sample masks), models they do not name,
averages over models, and module accuracies (theirs is the best epoch on the test set).
"""

from __future__ import annotations

import csv
import re
from importlib.resources import files
from statistics import fmean
from typing import Any, NamedTuple

from nemo.report.collect import Results
from nemo.report.words import shape_of
from nemo.results import CellResult

# (metric, is it that of a 3-class sub-task) in published.csv -> our metric
SAME = {
    ("module kernel retention rate", False): "nrr",
    ("cohesion", False): "cohesion",
    ("coupling", False): "coupling",
    ("module kernel retention rate", True): "nrr",
}
PUBLISHED_METRICS = {  # of the paper's abstract: averages over models, at full scale
    "gain_points": ("module accuracy gain", 1),
    "size_reduction": ("module size reduction", 100),
}
NOTHING = "No published figure measures the same thing on this data set and these models."


class Beside(NamedTuple):
    """One of our numbers and the published one, each with its scale."""

    what: str
    ours: str
    scale: str
    published: str
    published_scale: str


def published_rows() -> list[dict[str, str]]:
    text = files("nemo.report").joinpath("published.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


PUBLISHED = {
    name: float(next(row["value"] for row in published_rows() if row["metric"] == metric)) / by
    for name, (metric, by) in PUBLISHED_METRICS.items()
}


def beside(results: Results, dataset: str) -> list[Beside]:
    """The published figures that match cells of `dataset`; empty where none does."""
    title = str(results.datasets[dataset]["title"])
    found = []
    for row in published_rows():
        metric = SAME.get((row["metric"], "3-class" in row["setting"]))
        cells = [
            cell
            for cell in results.of(dataset)
            if re.match(rf"{re.escape(row['dataset'])}(?!\d)", title)
            and cell.cell.model == row["model"].lower()
            and row["source"].lower().startswith(cell.cell.method)
        ]
        if metric and cells:
            found += _pairs(cells, row, metric, title)
    return found


def _pairs(cells: list[CellResult], row: dict[str, str], metric: str, title: str) -> list[Beside]:
    pairs = []
    name, scale = cells[0].cell, _scale(cells[0], title)
    for subset, entries in _entries(cells, "3-class" in row["setting"]).items():
        value = fmean(entry[metric] for entry in entries)
        ours = f"{100 * value:.2f} %" if row["unit"] == "percent" else f"{value:.4f}"
        what = f"{name.model} {name.method}{subset}: {row['metric']}"
        unit = " %" if row["unit"] == "percent" else ""
        theirs = f"{row['source']}: {row['dataset']}, {row['model']}, {row['setting']}"
        pairs.append(Beside(what, ours, scale, row["value"] + unit, theirs))
    return pairs


def _entries(cells: list[CellResult], three_classes: bool) -> dict[str, list[dict[str, Any]]]:
    """Our entries to average: the cells', or those of each subset of three classes."""
    if not three_classes:
        return {"": [cell.metrics for cell in cells]}
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        for module in cell.modules:
            if len(module.metrics["classes"]) == 3:
                groups.setdefault(f" {module.subset}", []).append(module.metrics)
    return groups


def _scale(cell: CellResult, title: str) -> str:
    epochs, threshold = len(cell.history), cell.params.get("masks.threshold", 0)
    return f"{title}, {shape_of(cell)}, {epochs} epochs, threshold {threshold:g}"
