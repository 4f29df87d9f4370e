"""What the tables are: their keys, their columns, and how a number is shown.

One row of a CSV is one seed, so nothing is lost; Markdown and HTML show mean +- sd over seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def plain(value: float) -> str:
    return f"{value:.3f}"


def points(value: float) -> str:
    return f"{value:+.1f}" if round(value, 1) else "0.0"  # never -0.0


def whole(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def small(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def count(value: float) -> str:
    """Three significant digits: 845, 12.3 k, 11.2 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{value:.0f}"


@dataclass(frozen=True)
class Column:
    """A column of the CSV; shown under `header` when it has one."""

    name: str
    header: str = ""
    form: Callable[[float], str] = plain
    spread: bool = True  # show the sd over seeds
    ratio: str = ""  # the column whose percentage stands behind in brackets


@dataclass(frozen=True)
class Table:
    """One table. `keys` identify a row; "seed" is always the last of them and is averaged over."""

    name: str
    title: str
    note: str
    keys: tuple[Column, ...]
    columns: tuple[Column, ...]

    @property
    def key_names(self) -> list[str]:
        return [column.name for column in self.keys]

    @property
    def names(self) -> list[str]:
        return self.key_names + [column.name for column in self.columns]


@dataclass(frozen=True)
class Grid:
    """A table ready to be shown: strings only; the first `labels` columns are text."""

    headers: list[str]
    rows: list[list[str]]
    labels: int


MODULAR = Table(
    "modular",
    "Modular models",
    "Accuracy is top-1 on the test images. Loss is the points of accuracy lost against the "
    "standard model of the same seed (negative: gained). NRR: the share of neurons that a class "
    "keeps, mean over classes. Cohesion and coupling: mean Jaccard similarity of masks within a "
    "class and between classes. Dead layers: masked layers that are dead for at least one class. "
    "Parameters and FLOPs (of one image) are those of the model before decomposing.",
    (
        Column("dataset"),
        Column("model", "Model"),
        Column("method", "Method"),
        Column("seed"),
    ),
    (
        Column("accuracy", "Accuracy %", percent),
        Column("loss_points", "Loss, points", points),
        Column("nrr", "NRR"),
        Column("cohesion", "Cohesion"),
        Column("coupling", "Coupling"),
        Column("dead_layers", "Dead layers", whole, spread=False),
        Column("layers"),
        Column("neurons"),
        Column("parameters", "Parameters", count, spread=False),
        Column("generator_parameters"),
        Column("flops", "FLOPs", count, spread=False),
        Column("epochs"),
    ),
)
MODULES = Table(
    "modules",
    "Modules per subset",
    "Accuracy % on the test images of the subset's classes: of the standard model restricted to "
    "them, of the modular model with its soft masks restricted to them, of the module as cut "
    "(step 0) and as fine-tuned. NRR: the share of neurons that the module keeps. In brackets: % "
    "of the standard model. Certificate: the largest float64 difference between the module as cut "
    "and the masked model it was cut from, relative to the output's standard deviation.",
    (
        Column("dataset"),
        Column("model", "Model"),
        Column("method", "Method"),
        Column("subset", "Classes"),
        Column("seed"),
    ),
    (
        Column("classes"),
        Column("accuracy_standard", "Standard", percent),
        Column("accuracy_modular", "Modular", percent),
        Column("accuracy_step0", "Step 0", percent),
        Column("accuracy", "Fine-tuned", percent),
        Column("nrr", "NRR"),
        Column("parameters", "Parameters", count, spread=False, ratio="parameters_ratio"),
        Column("parameters_ratio"),
        Column("flops", "FLOPs", count, spread=False, ratio="flops_ratio"),
        Column("flops_ratio"),
        Column("blocked"),
        Column("certificate", "Certificate", small, spread=False),
    ),
)
TABLES = (MODULAR, MODULES)


def grid(table: Table, frame: pd.DataFrame) -> Grid:
    """The rows of one data set, seeds averaged, as they are shown."""
    labels = [c for c in table.keys if c.header]
    shown = [c for c in table.columns if c.header]
    groups = frame.groupby([c.name for c in labels], sort=False, dropna=False)
    rows = []
    for key, rows_of_key in groups:
        rows.append([str(k) for k in key] + [_cell(c, rows_of_key) for c in shown])
    return Grid([c.header for c in labels + shown], rows, len(labels))


def _cell(column: Column, rows: Any) -> str:
    values = rows[column.name].dropna().astype(float)
    if not len(values):
        return ""
    pick = max if column.name == "certificate" else _mean  # a bound, not a quantity
    text = column.form(pick(values))
    if column.spread and len(values) > 1:
        text += f" ± {column.form(values.std()).lstrip('+')}"
    if column.ratio:
        text += f" ({100 * rows[column.ratio].astype(float).mean():.0f} %)"
    return text


def _mean(values: pd.Series[float]) -> float:
    return float(values.mean())


def markdown(shown: Grid) -> str:
    from tabulate import tabulate

    numbers = len(shown.headers) - shown.labels
    align = ["left"] * shown.labels + ["right"] * numbers
    return tabulate(
        shown.rows, shown.headers, tablefmt="pipe", colalign=align, disable_numparse=True
    )
