"""What decides the results of a cell, as flat values: written once, for all that must know it.

Checkpoints, DVC's plan, result files and MLflow's runs all name a training by these values (ours).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from nemo.cells import Cell
from nemo.config import Params
from nemo.fields import Family, PerFamily
from nemo.files import rounded
from nemo.masking.objectives import Objective
from nemo.sections import TrainParams

# Keys that say where or how something is computed, and not what.
WHERE = {
    *("data.memory", "train.processes", "train.cuda_graphs", "train.at_chance"),
    *("finetune.processes", "finetune.cuda_graphs"),
    *("start.processes", "start.cuda_graphs", "start.at_chance"),
}
# Of these the images themselves speak: another path to the same images gives the same results.
ORIGIN = frozenset({"data.source", "data.title"})


def settings(params: Params, cell: Cell, family: Family) -> dict[str, Any]:
    """{dotted key of params.yaml: value}: all that decides what the stages make of `cell`.

    A variant's overrides are applied, and of two values for two families it is the model's.
    """
    own, base = params.for_method(cell.method), params.base_of(cell.method)
    groups: dict[str, Any] = {
        "data": own.data[cell.dataset],
        "architecture": own.architecture.of(cell.model),
        "train": own.train,
        **start_settings(params.start_of(cell.method)),
    }
    if base.modular:
        groups |= objective_settings(own, base)
        groups |= {"masks": own.masks, "decompose": own.decompose, "finetune": own.finetune}
    found = flat(groups, family)
    if found["data.source"].startswith("folder:"):
        found["data.source"] = "folder"  # where it lies on one machine is no property of a result
    return found


def objective_settings(params: Params, base: Objective) -> dict[str, Any]:
    """The section of a method, by its key; of a standard model none."""
    return {} if base.section is None else {base.section: params.section(base.section)}


def start_settings(start: TrainParams | None) -> dict[str, Any]:
    """The training of the standard model that another one starts from, as a section."""
    return {} if start is None else {"start": start}


def flat(groups: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Sections as {dotted key: value}; what is None, or decides nothing, is left out."""
    found: dict[str, Any] = {}
    for prefix, group in groups.items():
        for name, value in group:
            chosen = value.of(family) if isinstance(value, PerFamily) else value
            if isinstance(chosen, BaseModel):
                found |= flat({f"{prefix}.{name}": chosen}, family)
            elif chosen is not None and f"{prefix}.{name}" not in WHERE:
                found[f"{prefix}.{name}"] = chosen
    return found


def differences(made: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How two settings differ, as files keep them, a line a key; the origin of the images does not
    count, and older files have keys of `WHERE`."""
    made, now = (json.loads(json.dumps(rounded(dict(values)))) for values in (made, now))
    keys = sorted(key for key in {*made, *now} - ORIGIN - WHERE if made.get(key) != now.get(key))
    return [f"made with {key} {made.get(key)}, and params have {now.get(key)}" for key in keys]


def fits(result: Any, params: Params) -> list[str]:
    """Why a file of results (`nemo.results.CellResult`) is not of `params`: a line each; empty if
    it is."""
    cell = result.cell
    try:
        if params.base_of(cell.method).name != result.base:
            return [f"made as {result.base}, and params have {params.base_of(cell.method).name}"]
        now = settings(params, cell, result.family)
    except (ValueError, KeyError, AttributeError):
        return [f"params have no {cell.name}"]
    return differences(result.params, now)
