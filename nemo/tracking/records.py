"""What a run says of a cell or a module: its key, name, tags, params, curves and figures.

All of it comes from the cell's own file of results, which states what made it. A run that training
opens has the same key and params, so that the finished results complete it (ours).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nemo.cells import Cell
from nemo.files import rounded
from nemo.metrics import Subject, logged
from nemo.results import History, ModuleResult

Point = tuple[str, float, int]  # name, value, step
# Sections of params.yaml that every method has; another one is the objective's own.
SHARED = ("data", "architecture", "train", "start", "masks", "decompose", "finetune")


@dataclass(frozen=True)
class Record:
    """A run as it should stand in the store; without `points` while it is training."""

    tags: dict[str, str]
    params: dict[str, Any]
    points: list[Point] = field(default_factory=list)


def cell_key(profile: str, cell: Cell, settings: Mapping[str, Any], data_sha256: str) -> str:
    """What names a cell's runs: equal exactly where profile, cell, settings and images are.

    Args:
        settings: `nemo.settings.settings`, or `params` of the cell's file of results.
    """
    return digest([profile, asdict(cell), rounded(dict(settings)), data_sha256])


def open_record(profile: str, cell: Cell, base: str, settings: Mapping[str, Any]) -> Record:
    """The run of a cell before it has results."""
    tags = {
        "mlflow.runName": _name(cell, settings),
        "role": "cell",
        "profile": profile,
        "base": base,
        **{name: str(value) for name, value in asdict(cell).items()},
    }
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = experiment
    return Record(tags, asdict(cell) | rounded(dict(settings)))


def cell_record(subject: Subject) -> Record:
    """The finished run of a cell."""
    result = subject.cell
    record = open_record(result.profile, result.cell, result.base, result.params)
    revision = result.made.get("trained", {}).get("revision")
    tags = record.tags | ({"mlflow.source.git.commit": revision} if revision else {})
    return Record(tags, record.params, _points(result.history, subject))


def module_record(subject: Subject, module: ModuleResult, parent: str) -> Record:
    """The run of a cell's module, below that of the cell, whose id is `parent`."""
    cell = cell_record(Subject(subject.cell))
    tags = cell.tags | {
        "mlflow.runName": f"{module.subset} {cell.tags['mlflow.runName']}",
        "mlflow.parentRunId": parent,
        "role": "module",
        "subset": module.subset,
    }
    settings = cell.params | {"subset": module.subset}
    return Record(tags, settings, _points(module.history, subject))


def curves(rows: History) -> list[Point]:
    """Every finite number of the rows as (name, value, epoch)."""
    return [
        (name, float(value), int(row["epoch"]))
        for row in rows
        for name, value in row.items()
        if name != "epoch" and math.isfinite(value)
    ]


def objective_keys(settings: Mapping[str, Any]) -> list[str]:
    """The numbers among an objective's own settings, such as loss.alpha and loss.tau."""
    return sorted(
        key
        for key, value in settings.items()
        if key.split(".")[0] not in SHARED
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    )


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _points(history: History, subject: Subject) -> list[Point]:
    """Curves, and the final figures that are not the end of a curve."""
    found = curves(history)
    drawn = {name for name, _, _ in found}
    final = logged(subject).items()
    return found + [(n, v, 0) for n, v in final if n not in drawn and math.isfinite(v)]


def _name(cell: Cell, settings: Mapping[str, Any]) -> str:
    """nemo-0 a2 t0.5 resnet18 digits: the UI shows about 20 letters, so what differs is first."""
    keys = objective_keys(settings)
    strengths = [f"{key.split('.')[-1][0]}{settings[key]:g}" for key in keys]
    return " ".join([f"{cell.method}-{cell.seed}", *strengths, cell.model, cell.dataset])
