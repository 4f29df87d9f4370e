"""Whether the defaults of `nemo modularize` train: five networks, four data sets, both methods.

    python -m benchmarks.defaults --data FOLDER --jobs 2

FOLDER holds svhn/svhn-7136.tar, cifar10/ and tiny-imagenet/; digits needs none. Each training is a
process of its own. Its row is in the .csv as soon as it ends, and is not computed again while its
params are the same. `--set loss.alpha=0.5` measures another recipe beside the defaults.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from benchmarks.measuring import DEVICES, REPORTS, Row, where
from nemo.cells import Cell, Layout
from nemo.config import STANDARD, Params
from nemo.data import Batches, load
from nemo.device import resolve_device
from nemo.files import read_json
from nemo.locks import locked
from nemo.models import family_named
from nemo.pipeline import masks, prepare
from nemo.pipeline.modularize import METHOD, defaults, own_params
from nemo.predict import accuracy, predict
from nemo.settings import ORIGIN, settings
from nemo.trained import load_cell
from nemo.training.cell import idle, train_cell

# Where images are below FOLDER, and which of them; a path that is None is no path, but a source.
DATASETS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "digits": (None, {}),
    "svhn": ("svhn/svhn-7136.tar", {}),
    "cifar10": ("cifar10", {"data.limit": 5000}),
    "tiny-imagenet": ("tiny-imagenet", {"data.classes": "0-19"}),
}
MODELS: dict[str, dict[str, Any]] = {
    "vgg16": {"width": 0.25},
    "resnet18": {"width": 0.25},
    "vit_small": {"dim": 64, "depth": 4, "heads": 4, "patch": 4},
    "timm/resnet18": {},
    "timm/vit_tiny_patch16_224": {"arguments": {"patch_size": 4}},
}
METHODS = (STANDARD, METHOD)
SHARED = ("train", "data")  # sections that a standard training has, too
NEAR = 4.0  # points that NeMo's parent may be below the standard model
KEY = ["dataset", "model", "method", "set"]
COLUMNS = [*KEY, "accuracy", "chance", "nrr", "seconds", "machine", "recipe", "failure"]


@dataclass(frozen=True)
class Task:
    """One training: `changes` to the defaults by dotted key, and `technical` ones, which decide
    nothing."""

    dataset: str
    model: str
    method: str
    changes: dict[str, Any]
    technical: dict[str, Any]
    folder: Path
    work: Path
    threads: int

    @property
    def own(self) -> dict[str, Any]:
        """The changes that concern this method."""
        modular = self.method == METHOD
        return {k: v for k, v in self.changes.items() if modular or k.split(".")[0] in SHARED}

    @property
    def key(self) -> tuple[str, ...]:
        return (self.dataset, self.model, self.method, _text(self.own))

    def params(self) -> Params:
        path, part = DATASETS[self.dataset]
        own_size = path is None and not self.model.startswith("timm/")  # 16 pixels
        changes = {
            "architecture": dict(MODELS[self.model]),
            "train.at_chance": "keep",
            "data.size": None if own_size else 32,
            **part,
            **self.technical,
            **self.own,
        }
        source = self.dataset if path is None else f"folder:{self.folder / path}"
        return own_params(self.model, source, "all", changes=changes)

    def recipe(self, params: Params) -> str:
        """What decides the row, as a hash; nothing is cut for it."""
        found = settings(params, self.cell(params), family_named(self.model))
        without = {key for key in found if key.split(".")[0] in ("decompose", "finetune")}
        return _hash({k: v for k, v in found.items() if k not in ORIGIN | without})

    def cell(self, params: Params) -> Cell:
        return Cell(params.datasets[0], self.model, self.method, params.seeds[0])


def _text(changes: dict[str, Any]) -> str:
    return " ".join(f"{k}={json.dumps(v).replace(' ', '')}" for k, v in sorted(changes.items()))


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def row_of(task: Task) -> Row:
    """`measure` in a fresh process. What goes wrong is in `failure` of the row, also when the
    process is killed, so that the other cells are computed all the same."""
    row: Row = {**dict(zip(KEY, task.key, strict=True)), "failure": ""}
    row["recipe"] = task.recipe(task.params())
    row["machine"] = where(task.technical["device"])
    begin = time.perf_counter()
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            row |= process.submit(measure, task).result()
    except (ArithmeticError, OSError, RuntimeError, ValueError) as error:
        row["failure"] = str(error).splitlines()[0]
    return {**row, "seconds": round(time.perf_counter() - begin)}


def measure(task: Task) -> Row:
    """Train the cell of a task, unless its weights are there, and measure it on the test images."""
    torch.set_num_threads(task.threads)
    params = task.params()
    cell = task.cell(params)
    images = task.work / _hash(params.data[cell.dataset].model_dump())
    layout = Layout(task.work / task.recipe(params), images)
    folder = layout.data(cell.dataset)
    with locked(images.with_suffix(".lock"), say=False):
        if not folder.is_dir():
            prepare.run(params, cell.dataset, layout)
    data, device = load(folder), resolve_device(params.device)
    if not layout.train(cell).is_dir():
        for line in idle(train_cell(params, cell, data, layout.train(cell))):
            print(f"{cell.name}: {line}")
    test = Batches(data.splits["test"], data.mean, data.std, 256, device=device)
    logits, labels = predict(load_cell(layout.train(cell)).to(device), test)
    row: Row = {
        "accuracy": accuracy(logits, labels),
        "chance": float(labels.bincount().max()) / len(labels),
    }
    if task.method == METHOD:
        masks.run(params, cell, layout)
        row["nrr"] = read_json(layout.masks(cell) / "metrics.json")["nrr"]
    return row


def table_of(rows: pd.DataFrame) -> pd.DataFrame:
    """A line for each NeMo row, beside the standard row of the same images and training."""
    lines = []
    found = {tuple(row[k] for k in KEY): row for row in rows.to_dict("records")}
    for (dataset, model, method, changes), row in found.items():
        if method == METHOD:
            shared = [c for c in changes.split() if c.split(".")[0] in SHARED]
            standard = found.get((dataset, model, STANDARD, " ".join(shared)), {})
            both = [100 * part.get("accuracy", float("nan")) for part in (standard, row)]
            lines.append(
                {
                    "data set": dataset,
                    "model": model,
                    "set": changes,
                    "most frequent class": round(100 * row["chance"], 1),
                    "standard": round(both[0], 1),
                    "NeMo": round(both[1], 1),
                    "difference": round(both[1] - both[0], 1),
                    "NRR": round(row["nrr"], 3),
                    "machine": row["machine"],
                    "failure": row["failure"],
                }
            )
    table = pd.DataFrame(lines)
    empty = [name for name in ("set", "failure") if name in table and not table[name].any()]
    return table.drop(columns=empty)


def write(rows: dict[tuple[str, ...], Row], out: Path) -> None:
    """out.csv of the rows, and out.md of their table."""
    order = {name: index for index, name in enumerate([*DATASETS, *MODELS, *METHODS])}
    ordered = sorted(rows, key=lambda key: (*(order[name] for name in key[:3]), key[3]))
    frame = pd.DataFrame([rows[key] for key in ordered], columns=COLUMNS)
    frame.to_csv(out.with_suffix(".csv"), index=False, lineterminator="\n")
    table = table_of(frame)
    near = int((table["difference"] >= -NEAR).sum()) if len(table) else 0
    caption = (
        "Test accuracies (%) of a standard training and of NeMo's parent with its soft masks, with "
        "the defaults of `nemo modularize`, seed 0: ours at width 0.25 or dim 64, timm's ViT with "
        "patches of 4 pixels; 7,136 test crops of SVHN, split 72/28, 5,000 images of CIFAR-10 "
        "(JPEG), 20 classes of Tiny ImageNet, 32 pixels (digits in ours: 16). NeMo is at most "
        f"{NEAR:.0f} points below the standard model in {near} of {len(table)} lines. "
        "`python -m benchmarks.defaults`."
    )
    out.with_suffix(".md").write_text(f"{caption}\n\n{table.to_markdown(index=False)}\n")


def read(out: Path) -> dict[tuple[str, ...], Row]:
    file = out.with_suffix(".csv")
    if not file.exists():
        return {}
    texts = dict.fromkeys(("set", "machine", "recipe", "failure"), str)
    frame = pd.read_csv(file, dtype=texts).fillna(dict.fromkeys(texts, ""))
    rows: list[Any] = frame.to_dict("records")
    return {tuple(row[k] for k in KEY): row for row in rows}


def _change(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    if key.split(".")[0] not in {*defaults(), "data"} or key.count(".") != 1 or not value:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: such as loss.alpha=0.5")
    return key, yaml.safe_load(value)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(), help="Where the images are.")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--set", nargs="+", type=_change, default=[], metavar="KEY=VALUE")
    parser.add_argument("--epochs", type=int, help="Of training; as --set train.epochs=N.")
    parser.add_argument("--device", **DEVICES)
    parser.add_argument("--cuda-graphs", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="Trainings at once.")
    parser.add_argument("--out", type=Path, default=REPORTS / "defaults", help="Without suffix.")
    parser.add_argument("--work", type=Path, default=Path("nemo-work/defaults"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    changes = dict(options.set) | ({"train.epochs": options.epochs} if options.epochs else {})
    technical = {"device": options.device, "train.cuda_graphs": options.cuda_graphs}
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    rest = (changes, technical, options.data, options.work, threads)
    # the longest first, so that no process is left alone with one at the end
    tasks = [
        Task(dataset, model, method, *rest)
        for model in reversed(options.models)
        for dataset in reversed(options.datasets)
        for method in reversed(options.methods)
    ]
    rows, todo = read(options.out), []
    for task in tasks:
        row = rows.get(task.key, {})
        if row.get("recipe") != task.recipe(task.params()) or row["failure"]:
            todo.append(task)
    print(f"{len(tasks) - len(todo)} rows are there, {len(todo)} to compute", flush=True)
    torch.set_num_threads(threads)
    failed = 0
    with ThreadPoolExecutor(options.jobs) as executor:
        for future in as_completed([executor.submit(row_of, task) for task in todo]):
            row = future.result()
            failed += row["failure"] != ""
            print({k: v for k, v in row.items() if k != "recipe"}, flush=True)
            rows[tuple(row[k] for k in KEY)] = row
            write(rows, options.out)
    sys.exit(f"{failed} failed" if failed else 0)


if __name__ == "__main__":
    main()
