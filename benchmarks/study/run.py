"""Compute one unit, from training to the JSON file that the tables are made of."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.baselines import baselines
from benchmarks.study.gap import mask_gap
from benchmarks.study.granularity import granularity
from benchmarks.study.plan import WHERE, Unit
from benchmarks.study.provenance import provenance
from nemo.cells import MODULAR, Cell, Layout, cells
from nemo.config import Params, ParamsError, PerFamily
from nemo.data import Batches, Prepared
from nemo.device import resolve_device
from nemo.evaluation.evaluate import evaluate_model
from nemo.evaluation.modular import measure_masks
from nemo.files import new_folder, read_json, write_json
from nemo.locks import locked
from nemo.masking.class_masks import (
    cohesion,
    coupling,
    mask_frequency,
    masks_from_frequency,
    retention_rate,
    sample_bits,
)
from nemo.masking.generators import Modular
from nemo.models.registry import MODEL_FAMILIES
from nemo.pipeline.decompose import cut_module
from nemo.report.results import read_history
from nemo.training.cell import load_cell, train_cell, weights_sha256
from nemo.training.finetune import finetune_module

WORK = Path("study")
CELLS = Path("reports/cifar10-cpu/cells")
Job = Callable[[], Any]
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def run_unit(unit: Unit, profile: Params, data: Prepared) -> Path:
    """Compute what is missing of `unit` and write its file; a killed run goes on where it was."""
    for jobs in unit_jobs(unit, profile, data):
        for job in jobs.values():
            job()
    params = unit.params(profile)
    layout = unit_layout(params, unit, data)
    subsets, chosen = unit.subsets_of(params), _chosen(unit, params)
    narrowed = params.model_copy(update={"methods": list(unit.methods), "subsets": subsets})
    evaluate_model(narrowed, data.name, unit.model, data, layout)
    extras: dict[str, list[dict[str, Any]]] = {}
    for what, job in _measurements(unit, params, data, layout):
        extras.setdefault(what, []).extend(job())
    file = CELLS / f"{unit.name}.json"
    write_json(file, {**_facts(unit, params, data, layout, chosen, subsets), **extras})
    return file


@contextmanager
def claimed(units: list[Unit], profile: Params, data: Prepared) -> Iterator[None]:
    """Nobody else computes these units meanwhile, and each on one kind of device only.

    Raises:
        ParamsError: a unit was begun on another kind of device.
    """
    device = resolve_device(profile.device).type
    with ExitStack() as stack:
        for unit in sorted(units, key=lambda unit: unit.name):
            folder = unit_layout(unit.params(profile), unit, data).root
            stack.enter_context(locked(folder.with_name(f"{folder.name}.lock")))
            begun = folder / "device.json"
            if begun.exists() and read_json(begun)["device"] != device:
                raise ParamsError(
                    f"device: {device}, and {folder} was begun on another; "
                    f"accepted: {read_json(begun)['device']}, or remove that folder"
                )
            write_json(begun, {"device": device})
        yield


def unit_jobs(unit: Unit, profile: Params, data: Prepared) -> tuple[dict[str, Job], ...]:
    """What a unit consists of, in three steps: training, cutting, and all else. The jobs of a step
    do not need each other's results. A job that two units share has one name. Each does nothing,
    or gives what it has, if it was done."""
    params = unit.params(profile)
    layout, subsets = unit_layout(params, unit, data), unit.subsets_of(params)
    train, cut, measure = {}, {}, {}
    for cell in _chosen(unit, params):
        folder = _trained(params, cell, data)
        train[f"{folder} {cell.name}"] = partial(_train, params, cell, data, folder)
        cut[f"{layout.root} {cell.name}"] = partial(
            _cut, params, cell, data, layout, folder, subsets
        )
        if cell.method in MODULAR:
            for subset in subsets:
                tune = partial(_tune, params, cell, data, layout, subset)
                measure[f"{layout.finetuned(cell, subset)}"] = tune
    for number, (what, job) in enumerate(_measurements(unit, params, data, layout)):
        measure[f"{layout.root} {what} {number}"] = job
    return train, cut, measure


def _measurements(
    unit: Unit, params: Params, data: Prepared, layout: Layout
) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """What the tables need besides the evaluation, each kept in a file of the unit."""
    modular = [cell for cell in _chosen(unit, params) if cell.method in MODULAR]
    for cell in modular if not unit.changes else ():
        kept = layout.root / "gap" / f"{cell.method}.json"
        yield "gap", partial(once, kept, partial(mask_gap, params, cell, data, layout))
        kept = layout.root / "thresholds" / f"{cell.method}.json"
        yield "thresholds", partial(once, kept, partial(_thresholds, params, cell, data, layout))
    if unit.baselines:
        for file, make in baselines(params, unit, data, layout):
            yield "baselines", partial(once, file, make)
    if unit.granularity:
        for file, make in granularity(params, unit, data, layout):
            yield "granularity", partial(once, file, make)


def once(file: Path, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows in `file`, made first if they are not there."""
    if not file.exists():
        write_json(file, make())
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    return rows


def _chosen(unit: Unit, params: Params) -> list[Cell]:
    return [cell for cell in cells(params) if cell.method in unit.methods]


def unit_layout(params: Params, unit: Unit, data: Prepared) -> Layout:
    """Where the unit's weights and modules are; other params or images go elsewhere."""
    decides = params.model_dump(
        exclude={"device": True, "train": set(WHERE), "finetune": set(WHERE)}
    )
    return Layout(WORK / f"{unit.name}-{digest([decides, data.sha256])}")


def _trained(params: Params, cell: Cell, data: Prepared) -> Path:
    """Where a training is that any unit with the same one takes over."""
    family = MODEL_FAMILIES[cell.model]
    section = {"standard": None, "mwt": params.mwt, "nemo": params.loss}[cell.method]
    of_family = {
        key: value.of(family) if isinstance(value, PerFamily) else value
        for key, value in (section or ())
    }
    shape = params.architecture.of(cell.model).model_dump()
    recipe = params.train.model_dump(exclude=set(WHERE))
    device = resolve_device(params.device).type
    key = [cell.name, recipe, shape, of_family, data.sha256, data.flip, data.crop, device]
    return WORK / "trained" / digest(key)


def _train(params: Params, cell: Cell, data: Prepared, folder: Path) -> None:
    with locked(folder.with_name(f"{folder.name}.lock")):  # units share trainings
        if (folder / "train").exists():
            return
        ends: list[float] = [time.perf_counter()]
        train_cell(
            params,
            cell,
            data,
            folder / "train",
            lambda e, r: ends.append(time.perf_counter()),
            watch_test=True,
        )
        gaps = [b - a for a, b in itertools.pairwise(ends)]
        write_json(folder / "made.json", {**provenance(params), "epoch_seconds": gaps})


def _cut(
    params: Params, cell: Cell, data: Prepared, layout: Layout, trained: Path, subsets: list[str]
) -> None:
    """The trained cell as part of the unit, its class masks, and the modules of `subsets`."""
    if not layout.train(cell).exists():
        with new_folder(layout.train(cell)) as folder:
            shutil.copytree(trained / "train", folder, dirs_exist_ok=True)
            if (trained / "made.json").exists():  # else killed between the two: its times are lost
                shutil.copy(trained / "made.json", folder)
            else:
                write_json(folder / "made.json", provenance(params))
    if cell.method not in MODULAR:
        return
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


def _tune(params: Params, cell: Cell, data: Prepared, layout: Layout, subset: str) -> None:
    tuned = layout.finetuned(cell, subset)
    if not tuned.exists():
        finetune_module(params, cell, layout.module(cell, subset), data, tuned, watch_test=True)


def _thresholds(params: Params, cell: Cell, data: Prepared, layout: Layout) -> list[dict[str, Any]]:
    """T4: the class masks' figures at every threshold, from one pass over the images."""
    modular = _modular(params, cell, layout)
    seen = [
        ({layer: bit.cpu() for layer, bit in bits.items()}, labels.cpu())
        for bits, labels in sample_bits(modular, _training_images(params, data))
    ]
    bits = {layer: torch.cat([batch[layer] for batch, _ in seen]) for layer in modular.layers}
    labels = torch.cat([label for _, label in seen])
    frequency = mask_frequency([(bits, labels)])
    return [{"method": cell.method, **_at(t, frequency, bits, labels)} for t in THRESHOLDS]


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
        "provenance": provenance(params),
        "trained": made,
        "evaluation": evaluation,
        "history": history,
        "masks": masks,
        "finetuning": tuned,
    }


def digest(value: Any) -> str:
    """A short name for JSON values that decide a result."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
