"""Modules of different parents, merged, beside the union of class subsets of one parent.

    python benchmarks/merge.py            # prints the table
    python benchmarks/merge.py --write    # and writes it to reports/

Digits 0-4 and 5-9 are recognised together by (a) one module of one parent, cut by the OR of all
class masks; (b) two modules of two parents that were trained on all digits with different seeds,
merged; (c) the same where each parent saw the digits of its module only. All modules are
fine-tuned. The parents stay in the work folder, so that a second run trains none.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

import nemo
from nemo.cost import count_parameters
from nemo.cut import DecomposedModule
from nemo.data import Batches, Prepared, load, prepare
from nemo.files import rounded
from nemo.pipeline.modularize import make_module, own_params, train_parent
from nemo.predict import accuracy, predict

WAYS = {
    "union": "one parent, mask OR",
    "merge, parents saw all": "two parents, each trained on all ten",
    "merge, parents saw half": "two parents, each trained on its five",
}


def module_of(
    data: Prepared, classes: Sequence[int], subset: str, seed: int, epochs: int, work: Path
) -> DecomposedModule:
    """The fine-tuned module `subset` of a parent trained on `classes` of the data."""
    mine = data.restrict(classes)
    mine = replace(mine, sha256=f"{data.sha256} {list(classes)}")  # other data, another parent
    changes = {"architecture": {"width": 0.25}, "train.epochs": epochs, "data.size": data.size[0]}
    params = own_params("resnet18", "digits", subset, seed, changes)
    out = work / "modules" / f"{len(classes)}-{subset}-{seed}-{epochs}"
    return make_module(params, mine, train_parent(params, mine, work), out)


def row_of(way: str, seed: int, parts: list[DecomposedModule], data: Prepared) -> dict[str, Any]:
    """Accuracy and cross-entropy on the test images, before and after calibration."""
    validation, test = (
        Batches(data.splits[split], data.mean, data.std, 256) for split in ("val", "test")
    )
    whole = parts[0] if len(parts) == 1 else nemo.merge(*parts, validation)
    raw = [predict(part, test) for part in parts]
    labels = raw[0][1]
    logits = {"": predict(whole, test)[0], "_raw": torch.cat([r for r, _ in raw], 1)}
    measured = {f"accuracy{key}": accuracy(value, labels) for key, value in logits.items()}
    measured |= {
        f"cross_entropy{key}": F.cross_entropy(value, labels).item()
        for key, value in logits.items()
    }
    return {"way": way, "seed": seed, "parameters": count_parameters(whole), **measured}


def measure(seeds: int, epochs: int, data: Prepared, work: Path) -> list[dict[str, Any]]:
    every = range(10)
    rows = []
    for seed in range(seeds):
        other = seed + 1000
        low, high = range(5), range(5, 10)
        parts = {
            "union": [module_of(data, every, "all", seed, epochs, work)],
            "merge, parents saw all": [
                module_of(data, every, "0-4", seed, epochs, work),
                module_of(data, every, "5-9", other, epochs, work),
            ],
            "merge, parents saw half": [
                module_of(data, low, "all", seed, epochs, work),
                module_of(data, high, "all", other, epochs, work),
            ],
        }
        for way, modules in parts.items():
            rows.append(row_of(way, seed, modules, data))
            print(rows[-1], flush=True)
    return rows


def table_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Means over the seeds; the range of the accuracies behind theirs."""

    def line(way: str) -> dict[str, Any]:
        mine = [row for row in rows if row["way"] == way]
        mean = {key: statistics.mean(row[key] for row in mine) for key in mine[0] if key != "way"}
        accuracies = sorted(row["accuracy"] for row in mine)
        return {
            "0-4 with 5-9": way,
            "modules of": WAYS[way],
            "accuracy %": f"{100 * mean['accuracy']:.1f} "
            f"({100 * accuracies[0]:.1f} to {100 * accuracies[-1]:.1f})",
            "uncalibrated %": f"{100 * mean['accuracy_raw']:.1f}",
            "cross-entropy": f"{mean['cross_entropy']:.3f}",
            "uncalibrated": f"{mean['cross_entropy_raw']:.3f}",
            "parameters": f"{mean['parameters']:,.0f}",
        }

    return pd.DataFrame([line(way) for way in WAYS])


def write(rows: list[dict[str, Any]], epochs: int, data: Prepared) -> None:
    out = Path("reports")
    pd.DataFrame(rounded(rows)).to_csv(out / "merge.csv", index=False, lineterminator="\n")
    counts = ", ".join(f"{len(split)} {name}" for name, split in data.splits.items())
    seeds = len({row["seed"] for row in rows})
    caption = (
        f"Test accuracy and cross-entropy (nats) over all ten classes. {data.title}, {counts} "
        f"images of 3 x 16 x 16; resnet18 at width 0.25, {epochs} epochs, modules fine-tuned for "
        f"10; mean of {seeds} seeds, the range of accuracies in brackets; calibrated on the "
        f"validation images; float32, {torch.get_num_threads()} CPU threads, "
        f"torch {torch.__version__.split('+')[0]}.\n\n"
    )
    table = table_of(rows).to_markdown(index=False, disable_numparse=True)
    (out / "merge.md").write_text(caption + table + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path("nemo-work/merge"))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.work / "digits"
    params = own_params("resnet18", "digits", "all", changes={"data.size": 16})
    prepare("digits", params.data["digits"], folder)
    data = load(folder)
    rows = measure(arguments.seeds, arguments.epochs, data, arguments.work)
    print(table_of(rows).to_markdown(index=False))
    if arguments.write:
        write(rows, arguments.epochs, data)


if __name__ == "__main__":
    main()
