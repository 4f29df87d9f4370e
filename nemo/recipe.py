"""What decides the result of a stage: values of params, and code. DVC's plan is made of these.

A recipe is a dict of JSON values. The stage `plan` writes one file for each stage of each cell; the
stage itself depends on that file alone, and so runs again exactly when its recipe changes (ours).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo.alternatives import ALTERNATIVES
from nemo.cells import Cell, cells
from nemo.config import EXTRAS, Params
from nemo.data.subsets import FILE, defined, names_in_file
from nemo.fields import Family
from nemo.fingerprint import APART, fingerprint
from nemo.masking.objectives import Objective
from nemo.masking.selectors import SELECTORS
from nemo.models.registry import MODELS, Shape, family_named
from nemo.models.shapes import DeitShape
from nemo.results import result_files
from nemo.sections import TrainParams
from nemo.settings import flat, objective_settings, settings, start_settings

Recipe = dict[str, Any]
PACKAGE = "nemo."
# What measures each of the extras: a function of its name, (params, cell, data, layout) -> rows.
MEASURES = {
    "alternatives": "nemo.alternatives.compare",
    "budgets": "nemo.alternatives.budgets",
    "gap": "nemo.evaluation.gap",
    "granularity": "nemo.alternatives.granularity",
    "thresholds": "nemo.evaluation.thresholds",
}
# The sections of params that they read, besides their own.
READS = {
    "alternatives": ("architecture", "finetune"),
    "budgets": ("architecture", "finetune"),
    "granularity": ("finetune",),
}
# What a standard training imports and never runs.
MODULAR_ONLY = tuple(
    f"nemo.masking.{name}"
    for name in ("cut_pass", "functional", "generators", "hooks", "probe", "sites", "under")
)
# Prepared images are a dependency themselves; only how batches are made of them counts besides.
PREPARING = tuple(
    f"nemo.data.{name}"
    for name in ("errors", "folder", "images", "prepared", "sources", "splits", "stored", "tree")
)
STAGES = ("train", "masks", "decompose", "finetune", "evaluate", *EXTRAS)


def training(
    params: Params,
    base: Objective,
    model: str,
    shape: Shape,
    family: Family,
    start: TrainParams | None = None,
) -> Recipe:
    """What decides the weights of a model, besides its images, seed and device.

    Args:
        start: of the standard model whose weights it starts from.
    """
    groups = {"architecture": shape, "train": params.train, **start_settings(start)}
    groups |= objective_settings(params, base)
    code = ["nemo.training.cell", *_homes(model, base)]
    if isinstance(shape, DeitShape):
        code.append(MODELS["resnet18"].home)  # its teacher
    without = (*APART, *PREPARING) if base.modular else (*APART, *PREPARING, *MODULAR_ONLY)
    return {
        "model": model,
        "method": base.name,
        "settings": flat(groups, family),
        "code": fingerprint(code, params.plugins, without),
    }


def recipe(params: Params, cell: Cell, stage: str) -> Recipe | None:
    """What decides the result of a stage for a cell, besides what earlier stages made, and seed.

    None where a stage has nothing to do: a standard model has no masks.
    """
    own, base = params.for_method(cell.method), params.base_of(cell.method)
    family = family_named(cell.model)
    if stage == "train":
        shape, start = own.architecture.of(cell.model), params.start_of(cell.method)
        return training(own, base, cell.model, shape, family, start)
    if stage == "evaluate":
        more = {name: getattr(own, name).model_dump() for name in EXTRAS if _asks(own, name, cell)}
        # its file states all params, also one that changes no weight: sgd's momentum with adamw
        values = {**settings(params, cell, family), "subsets": defined(own.subsets), **more}
    elif not base.modular:
        return None
    elif stage == "masks":
        values = flat({"masks": own.masks}, family)
        if own.masks.batch_norm:
            cut = getattr(own.section(base.section), "cut", None)
            values["train.batch_size"] = own.train.batch_size
            values[f"{base.section}.cut.sizes"] = cut.sizes if cut else None
    elif stage == "decompose":
        values = flat({"decompose": own.decompose}, family)
        if own.decompose.recalibrate_bn:
            values["finetune.batch_size"] = own.finetune.batch_size
        if isinstance(classes := defined(own.subsets), dict):  # else the folder's name says them
            values["subsets"] = classes
    elif stage == "finetune":
        values = flat({"finetune": own.finetune}, family)
    elif _asks(own, stage, cell):
        return measuring(own, cell, stage)
    else:
        return None
    entries = [f"{PACKAGE}pipeline.{stage}", *_homes(cell.model)]
    if stage == "masks":
        entries.append(SELECTORS.named(own.masks.selector).choose.__module__)
    return {"settings": values, "code": _code(entries, params)}


def measuring(params: Params, cell: Cell, extra: str) -> Recipe:
    """What decides the rows of an extra, besides what earlier stages made, and seed.

    Args:
        params: those of the cell's method.
    """
    section = getattr(params, extra)
    values: dict[str, Any] = {extra: section.model_dump(exclude={"of"})}
    classes = defined(params.subsets)
    if extra in ("alternatives", "budgets", "gap") or isinstance(classes, dict):
        values["subsets"] = classes
    shape = params.architecture.of(cell.model)
    read = {"architecture": shape, "finetune": params.finetune}
    groups = {key: read[key] for key in READS.get(extra, ())}
    values |= flat(groups, family_named(cell.model))
    entries = [MEASURES[extra], *_homes(cell.model)]
    if extra in ("alternatives", "budgets"):
        entries += [ALTERNATIVES[kind].make.__module__ for kind in section.kinds]
    return {"settings": values, "code": _code(entries, params)}


def preparation(params: Params, dataset: str) -> Recipe:
    """What decides the prepared images of a data set."""
    values = params.data[dataset].model_dump(exclude={"memory"}, exclude_none=True)
    if values.get("classes", "").startswith(FILE):
        values["classes"] = names_in_file(values["classes"])
    return {"settings": values, "code": fingerprint([f"{PACKAGE}pipeline.prepare"])}


def plan(params: Params) -> Iterator[tuple[Path, Recipe | None]]:
    """(file below plan/, recipe) for every stage that params ask for."""
    for dataset in params.datasets:
        yield Path(dataset, "prepare.json"), preparation(params, dataset)
    done = set()
    for cell in cells(params):
        folder = Path(cell.dataset, cell.model, cell.method)
        for stage in STAGES if folder not in done else ():
            yield folder / f"{stage}.json", recipe(params, cell, stage)
        done.add(folder)
    # a report is cheap, and shows something of most files: names, labels, accepted values
    everything = fingerprint([f"{PACKAGE}report.build"], params.plugins, without=())
    others = {"beside": {name: _committed(name) for name in params.beside}} if params.beside else {}
    yield Path("report.json"), {"code": everything, **others}


def _committed(profile: str) -> str:
    """A hash of a profile and its results, which the report of another one shows."""
    files = [Path("profiles", f"{profile}.yaml"), *result_files(Path(), profile)]
    content = b"".join(file.read_bytes() for file in files if file.is_file())
    return hashlib.sha256(content).hexdigest()


def _code(entries: list[str], params: Params) -> str:
    return fingerprint(_ours(entries), params.plugins, (*APART, *PREPARING))


def _asks(params: Params, extra: str, cell: Cell) -> bool:
    return cell.method in getattr(params, extra).of


def _homes(model: str, base: Objective | None = None) -> list[str]:
    """The files that a model and an objective live in."""
    homes = [MODELS[model].home] if model in MODELS else []
    if base is not None and base.make is not None:
        homes.append(base.make.__module__)
    return _ours(homes)


def _ours(names: list[str]) -> list[str]:
    """Those of this package; a plugin counts as a file."""
    return [name for name in names if name.startswith(PACKAGE)]
