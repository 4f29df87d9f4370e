"""The finished results of exactly the cells that params.yaml lists.

A loop over params, never a glob: after an axis loses a value its old files stay on disk, and they
must not reach a table. Standard library only, so that tracking can read results without pandas.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo.cells import MODULAR, Cell, Layout, cells
from nemo.config import Params

History = list[dict[str, float]]


class MissingResultError(ValueError):
    """A result file is absent or unreadable: one line naming it and the command that makes it."""


@dataclass(frozen=True)
class ModuleResult:
    """One module: its entry in evaluation/, its fine-tuning history and its artefact folder."""

    subset: str
    metrics: dict[str, Any]
    history: History
    folder: Path


@dataclass(frozen=True)
class CellResult:
    """What the stages of one cell wrote."""

    cell: Cell
    metrics: dict[str, Any]  # its entry in evaluation/
    train: dict[str, Any]
    history: History
    masks: dict[str, Any] | None = None  # modular methods only
    modules: list[ModuleResult] = field(default_factory=list)


@dataclass(frozen=True)
class Results:
    """All cells in the order of `nemo.cells.cells`, and what evaluate says of each data set."""

    params: Params
    datasets: dict[str, dict[str, Any]]
    cells: list[CellResult]

    def of(self, dataset: str, model: str | None = None) -> list[CellResult]:
        """The cells of a data set, and of one model where `model` is given."""
        return [
            c for c in self.cells if c.cell.dataset == dataset and model in (None, c.cell.model)
        ]

    def standard_accuracy(self, cell: Cell) -> float:
        """Test accuracy of the standard model with the data set, model and seed of `cell`."""
        wanted = Cell(cell.dataset, cell.model, "standard", cell.seed)
        return next(float(c.metrics["accuracy"]) for c in self.cells if c.cell == wanted)


def read_results(params: Params, root: Path) -> Results:
    """Read every file that the cells of `params` name under `root`.

    Raises:
        MissingResultError: one is absent, is not what it should be, or lacks a cell or subset.
    """
    datasets: dict[str, dict[str, Any]] = {}
    found: list[CellResult] = []
    for dataset in params.datasets:
        for model in params.models:
            evaluation = _evaluation(root, dataset, model)
            datasets.setdefault(dataset, evaluation["dataset"])
            found += read_cells(params, root, dataset, model)
    return Results(params, datasets, found)


def read_cells(params: Params, root: Path, dataset: str, model: str) -> Iterator[CellResult]:
    """The cells of one data set and model, method by method, seed by seed."""
    layout = Layout(root)
    evaluation = _evaluation(root, dataset, model)
    for cell in cells(params):
        if (cell.dataset, cell.model) != (dataset, model):
            continue
        train = layout.train(cell)
        modular = cell.method in MODULAR
        masks = layout.masks(cell) / "metrics.json"
        yield CellResult(
            cell,
            _entry(evaluation, "cells", method=cell.method, seed=cell.seed),
            read_json(train / "metrics.json", root, "train"),
            read_history(train / "history.csv", root, "train"),
            read_json(masks, root, "masks") if modular else None,
            [_module(s, cell, root, evaluation) for s in params.subsets] if modular else [],
        )


def _module(subset: str, cell: Cell, root: Path, evaluation: dict[str, Any]) -> ModuleResult:
    folder = Layout(root).finetuned(cell, subset)
    key = {"method": cell.method, "seed": cell.seed, "subset": subset}
    entry = _entry(evaluation, "modules", **key)
    return ModuleResult(
        subset, entry, read_history(folder / "history.csv", root, "finetune"), folder
    )


def _evaluation(root: Path, dataset: str, model: str) -> dict[str, Any]:
    path = Layout(root).evaluation(dataset, model)
    found = read_json(path, root, "evaluate")
    for key in ("dataset", "cells", "modules"):
        if key not in found:
            raise MissingResultError(f"{_shown(path, root)} has no {key!r}; {_remedy('evaluate')}")
    return found


def _entry(evaluation: dict[str, Any], group: str, **key: Any) -> dict[str, Any]:
    for entry in evaluation[group]:
        if all(entry.get(name) == value for name, value in key.items()):
            return dict(entry)
    path = Layout().evaluation(evaluation["dataset"]["name"], evaluation["model"]).as_posix()
    wanted = ", ".join(f"{name} {value}" for name, value in key.items())
    raise MissingResultError(f"{path} has no entry for {wanted}; {_remedy('evaluate')}")


def read_json(path: Path, root: Path, stage: str) -> dict[str, Any]:
    try:
        content = json.loads(_read(path, root, stage))
    except json.JSONDecodeError as error:
        raise MissingResultError(
            f"{_shown(path, root)} is not JSON (line {error.lineno}); {_remedy(stage)}"
        ) from None
    if not isinstance(content, dict):
        raise MissingResultError(f"{_shown(path, root)} is no JSON object; {_remedy(stage)}")
    return content


def read_history(path: Path, root: Path, stage: str) -> History:
    """One dict per epoch; empty fields are left out, so that no NaN travels on."""
    rows = csv.DictReader(_read(path, root, stage).splitlines())
    try:
        return [{k: float(v) for k, v in row.items() if k and v} for row in rows]
    except (ValueError, TypeError):
        raise MissingResultError(
            f"{_shown(path, root)} holds what is no number; {_remedy(stage)}"
        ) from None


def _read(path: Path, root: Path, stage: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"({error.strerror})"
        raise MissingResultError(f"{_shown(path, root)} {reason}; {_remedy(stage)}") from None


def _shown(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _remedy(stage: str) -> str:
    return f"`dvc repro` makes it, or `nemo {stage}` by hand (nemo {stage} --help)"
