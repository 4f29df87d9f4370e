"""Compute one unit, from training to the JSON file that the tables are made of."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.baselines import measure_baselines
from benchmarks.study.gap import mask_gap
from benchmarks.study.granularity import granularity
from benchmarks.study.plan import Unit
from nemo.config import Params, PerFamily
from nemo.data import Batches, Prepared
from nemo.device import resolve_device
from nemo.evaluation.evaluate import evaluate_model
from nemo.evaluation.modular import measure_masks
from nemo.files import new_folder, read_json, write_json
from nemo.identifier import Modular
from nemo.layout import MODULAR, Cell, Layout, cells
from nemo.masks import (
    cohesion,
    coupling,
    mask_frequency,
    masks_from_frequency,
    retention_rate,
    sample_bits,
)
from nemo.models.registry import MODEL_FAMILIES
from nemo.report.results import read_history
from nemo.training.cell import load_cell, train_cell, weights_sha256
from nemo.training.cut import cut_module
from nemo.training.finetune import finetune_module

WORK = Path("study")
CELLS = Path("reports/cifar10-cpu/cells")
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def run_unit(unit: Unit, profile: Params, data: Prepared) -> Path:
    """Compute what is missing of `unit` and write its file; a killed run goes on where it was."""
    params = unit.params(profile)
    layout = unit_layout(params, unit, data)
    chosen = [cell for cell in cells(params) if cell.method in unit.methods]
    subsets = unit.subsets_of(params)
    for cell in chosen:
        _train(params, cell, data, layout)
        if cell.method in MODULAR:
            _modularize(params, cell, data, layout, subsets)
    narrowed = params.model_copy(update={"methods": list(unit.methods), "subsets": subsets})
    evaluate_model(narrowed, data.name, unit.model, data, layout)
    extras: dict[str, Any] = {}
    if not unit.changes:
        modular = [cell for cell in chosen if cell.method in MODULAR]
        extras["gap"] = [row for c in modular for row in mask_gap(params, c, data, layout)]
        extras["thresholds"] = [
            row for c in modular for row in _thresholds(params, c, data, layout)
        ]
    if unit.baselines:
        extras["baselines"] = measure_baselines(params, unit, data, layout)
    if unit.granularity:
        extras["granularity"] = granularity(params, unit, data, layout)
    file = CELLS / f"{unit.name}.json"
    write_json(file, {**_facts(unit, params, data, layout, chosen, subsets), **extras})
    return file


def unit_layout(params: Params, unit: Unit, data: Prepared) -> Layout:
    """Where the unit's weights and modules are; other params or images go elsewhere."""
    return Layout(WORK / f"{unit.name}-{digest([params.model_dump(), data.sha256])}")


def _train(params: Params, cell: Cell, data: Prepared, layout: Layout) -> None:
    """Train a cell, or take it from a unit that had the same one."""
    if layout.train(cell).exists():
        return
    family = MODEL_FAMILIES[cell.model]
    section = {"standard": None, "mwt": params.mwt, "nemo": params.loss}[cell.method]
    of_family = {
        key: value.of(family) if isinstance(value, PerFamily) else value
        for key, value in (section or ())
    }
    shape = params.architecture.of(cell.model).model_dump()
    recipe = params.train.model_dump(exclude={"processes"})
    key = [cell.name, recipe, shape, of_family, data.sha256, data.flip, data.crop]
    shared = WORK / "trained" / digest(key)
    if not (shared / "train").exists():
        ends: list[float] = [time.perf_counter()]
        train_cell(
            params,
            cell,
            data,
            shared / "train",
            lambda e, r: ends.append(time.perf_counter()),
            watch_test=True,
        )
        gaps = [b - a for a, b in itertools.pairwise(ends)]
        write_json(shared / "made.json", {**provenance(), "epoch_seconds": gaps})
    with new_folder(layout.train(cell)) as folder:
        shutil.copytree(shared / "train", folder, dirs_exist_ok=True)
        if (shared / "made.json").exists():  # else killed between the two: its times are lost
            shutil.copy(shared / "made.json", folder)
        else:
            write_json(folder / "made.json", provenance())


def _modularize(
    params: Params, cell: Cell, data: Prepared, layout: Layout, subsets: list[str]
) -> None:
    """Class masks, and the modules of `subsets` as cut and fine-tuned."""
    if not layout.masks(cell).exists():
        measure_masks(
            _modular(params, cell, layout),
            _training_images(params, data),
            params.masks.threshold,
            layout.masks(cell),
            weights_sha256(layout.train(cell)),
        )
    meta = {
        "classes": data.classes, "mean": data.mean, "std": data.std, "size": data.size
    }  # fmt: skip
    for subset in subsets:
        module = layout.module(cell, subset)
        if not module.exists():
            cut_module(cell, subset, layout.train(cell), layout.masks(cell), meta, module)
        if not layout.finetuned(cell, subset).exists():
            tuned = layout.finetuned(cell, subset)
            finetune_module(params, cell, module, data, tuned, watch_test=True)


def _thresholds(params: Params, cell: Cell, data: Prepared, layout: Layout) -> list[dict[str, Any]]:
    """T4: the class masks' figures at every threshold, from one pass over the images."""
    file = layout.masks(cell).with_name("thresholds.json")
    if not file.exists():
        modular = _modular(params, cell, layout)
        seen = [
            ({layer: bit.cpu() for layer, bit in bits.items()}, labels.cpu())
            for bits, labels in sample_bits(modular, _training_images(params, data))
        ]
        bits = {layer: torch.cat([batch[layer] for batch, _ in seen]) for layer in modular.layers}
        labels = torch.cat([label for _, label in seen])
        frequency = mask_frequency([(bits, labels)])
        write_json(file, [_at(threshold, frequency, bits, labels) for threshold in THRESHOLDS])
    return [{"method": cell.method, **row} for row in json.loads(file.read_text())]


def _at(
    threshold: float, frequency: dict[str, Tensor], bits: dict[str, Tensor], labels: Tensor
) -> dict[str, float]:
    masks = masks_from_frequency(frequency, threshold)
    return {
        "threshold": threshold,
        "nrr": retention_rate(masks),
        "cohesion": cohesion(bits, labels, masks),
        "coupling": coupling(masks),
    }


def _modular(params: Params, cell: Cell, layout: Layout) -> Modular:
    modular = load_cell(layout.train(cell)).to(resolve_device(params.device))
    assert isinstance(modular, Modular), cell.name
    return modular


def _training_images(params: Params, data: Prepared) -> Batches:
    device = resolve_device(params.device)
    return Batches(data.splits["train"], data.mean, data.std, 256, device=device)


def _facts(
    unit: Unit,
    params: Params,
    data: Prepared,
    layout: Layout,
    chosen: list[Cell],
    subsets: list[str],
) -> dict[str, Any]:
    """What was measured and what it was measured with."""
    evaluation = read_json(layout.evaluation(data.name, unit.model))
    history, made, masks = {}, {}, {}
    for cell in chosen:
        if cell.method in MODULAR:
            masks[cell.method] = read_json(layout.masks(cell) / "metrics.json")
        history[cell.method] = read_history(
            layout.train(cell) / "history.csv", layout.root, "train"
        )
        made[cell.method] = read_json(layout.train(cell) / "made.json")
    tuned = {
        f"{cell.method} {subset}": read_history(
            layout.finetuned(cell, subset) / "history.csv", layout.root, "finetune"
        )
        for cell in chosen
        if cell.method in MODULAR
        for subset in subsets
    }
    return {
        "unit": unit.name,
        "changes": unit.changes,
        "params": params.model_dump(),
        "data_sha256": data.sha256,
        "provenance": provenance(),
        "trained": made,
        "evaluation": evaluation,
        "history": history,
        "masks": masks,
        "finetuning": tuned,
    }


def provenance() -> dict[str, Any]:
    """Of the figures being made now: revision, library and class of machine."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {
        "revision": git.stdout.strip(),
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "threads": torch.get_num_threads(),
    }


def digest(value: Any) -> str:
    """A short name for JSON values that decide a result."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
