"""What a run says: names, params, metrics and curves of a cell or module, from finished files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nemo.cells import MODULAR, Cell
from nemo.config import MODEL_FAMILIES, Family, Params, PerFamily
from nemo.report.results import CellResult, History, ModuleResult

ARTEFACT = ("module.json", "module.safetensors", "metrics.json")


@dataclass(frozen=True)
class Record:
    """A run as it should stand in MLflow; `metrics` is empty while it is training."""

    key: str
    tags: dict[str, str]
    params: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    curves: History = field(default_factory=list)
    content: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


def cell_record(params: Params, cell: Cell, root: Path, result: CellResult | None = None) -> Record:
    settings = _settings(params, cell)
    about = {name: str(value) for name, value in asdict(cell).items()}
    tags = {"mlflow.runName": cell.name, "role": "cell", "profile": params.profile, **about}
    if "DVC_EXP_NAME" in os.environ:
        tags["dvc.experiment"] = os.environ["DVC_EXP_NAME"]
    tags |= _revision(root)
    key = digest([params.profile, settings])
    if result is None:
        return Record(key, tags, settings)
    names = ("accuracy", "nrr", "cohesion", "coupling", "parameters", "flops", "dead_layers")
    metrics = {n: float(result.metrics[n]) for n in names if result.metrics.get(n) is not None}
    return Record(key, tags, settings, metrics, result.history, result.metrics)


def module_record(params: Params, result: CellResult, module: ModuleResult, parent: str) -> Record:
    names = (
        *("accuracy", "accuracy_step0", "accuracy_standard", "accuracy_modular", "nrr"),
        *("parameters", "bytes", "flops", "parameters_ratio", "flops_ratio", "certificate"),
    )
    metrics = {n: float(module.metrics[n]) for n in names if module.metrics.get(n) is not None}
    tags = {
        "mlflow.runName": f"{result.cell.name}: {module.subset}",
        "mlflow.parentRunId": parent,
        "role": "module",
        "profile": params.profile,
        "subset": module.subset,
    }
    settings = {**_settings(params, result.cell), "subset": module.subset}
    files = [module.folder / name for name in ARTEFACT if (module.folder / name).is_file()]
    key = f"{parent}/{module.subset}"
    return Record(key, tags, settings, metrics, module.history, module.metrics, files)


def _settings(params: Params, cell: Cell) -> dict[str, Any]:
    """What decides the cell's results, under the names that params.yaml has for it."""
    family = _family(cell.model)
    settings: dict[str, Any] = asdict(cell)
    groups: dict[str, BaseModel] = {
        "data": params.data[cell.dataset].model_copy(update={"memory": None}),  # decides nothing
        "architecture": params.architecture.of(cell.model),
        "train": params.train,
    }
    if cell.method in MODULAR:
        groups |= {"masks": params.masks, "finetune": params.finetune}
        groups |= {"mwt": params.mwt} if cell.method == "mwt" else {"loss": params.loss}
    for name, group in groups.items():
        settings |= _flat(name, group, family)
    for where_and_how in ("train.processes", "finetune.processes"):  # they decide nothing
        settings.pop(where_and_how, None)
    return settings


def _flat(prefix: str, group: BaseModel, family: Family) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in group:
        chosen = value.of(family) if isinstance(value, PerFamily) else value
        if isinstance(chosen, BaseModel):
            flat |= _flat(f"{prefix}.{name}", chosen, family)
        elif chosen is not None:
            flat[f"{prefix}.{name}"] = chosen
    return flat


def _family(model: str) -> Family:
    if model in MODEL_FAMILIES:
        return MODEL_FAMILIES[model]
    import torch

    from nemo.models.registry import build_model, family_of

    with torch.device("meta"):  # a timm model: its layers decide, no weights are needed
        return family_of(model, build_model(model, 2, 224))


def _revision(root: Path) -> dict[str, str]:
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return {"mlflow.source.git.commit": done.stdout.strip()}
    return {}


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
