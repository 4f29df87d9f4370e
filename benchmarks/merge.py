"""Modules of different parents, merged, beside the union of class subsets of one parent.

    python -m benchmarks.merge            # prints the table
    python -m benchmarks.merge --write    # and writes it to reports/

Digits 0-4 and 5-9 are recognised together by (a) one module of one parent, cut by the OR of all
class masks; (b) two modules of two parents that were trained on all digits with different seeds,
merged; (c) the same where each parent saw the digits of its module only. All modules are
fine-tuned. The parents stay in the work folder, so that a second run trains none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

import nemo
from benchmarks.measuring import REPORTS, Row, parser, where
from nemo.cost import count_parameters
from nemo.cut import DecomposedModule
from nemo.data import Batches, Prepared, load, prepare
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


def row_of(way: str, seed: int, parts: list[DecomposedModule], data: Prepared) -> Row:
    """Accuracy and cross-entropy on the test images, before and after calibration."""
    validation, test = (
        Batches(data.splits[split], data.mean, data.std, 256) for split in ("val", "test")
    )
    whole = parts[0] if len(parts) == 1 else nemo.merge(parts[0], parts[1], validation)
    raw = [predict(part, test) for part in parts]
    labels = raw[0][1]
    logits = {"": predict(whole, test)[0], "_raw": torch.cat([r for r, _ in raw], 1)}
    measured = {f"accuracy{key}": accuracy(value, labels) for key, value in logits.items()}
    measured |= {
        f"cross_entropy{key}": F.cross_entropy(value, labels).item()
        for key, value in logits.items()
    }
    return {"way": way, "seed": seed, "parameters": count_parameters(whole), **measured}


def measure(seeds: int, epochs: int, data: Prepared, work: Path) -> pd.DataFrame:
    """A row per way and seed, as `row_of` makes them."""
    every, low, high = range(10), range(5), range(5, 10)
    rows = []
    for seed in range(seeds):
        other = seed + 1000
        asked = {
            "union": [(every, "all", seed)],
            "merge, parents saw all": [(every, "0-4", seed), (every, "5-9", other)],
            "merge, parents saw half": [(low, "all", seed), (high, "all", other)],
        }
        for way, parts in asked.items():
            modules = [module_of(data, *part, epochs, work) for part in parts]
            rows.append(row_of(way, seed, modules, data))
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def table_of(rows: pd.DataFrame) -> str:
    """Means over the seeds as Markdown; the range of the accuracies behind theirs."""
    lines = []
    for way, mine in rows.groupby("way", sort=False):
        mean, each = mine.drop(columns="way").mean(), 100 * mine["accuracy"]
        lines.append({
            "0-4 with 5-9": way,
            "modules of": WAYS[str(way)],
            "accuracy %": f"{each.mean():.1f} ({each.min():.1f} to {each.max():.1f})",
            "uncalibrated %": f"{100 * mean['accuracy_raw']:.1f}",
            "cross-entropy": f"{mean['cross_entropy']:.3f}",
            "uncalibrated": f"{mean['cross_entropy_raw']:.3f}",
            "parameters": f"{mean['parameters']:,.0f}",
        })  # fmt: skip
    return str(pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--epochs", type=int, default=20)
    options.add_argument("--work", type=Path, default=Path("nemo-work/merge"))
    arguments = options.parse_args()
    folder = arguments.work / "digits"
    params = own_params("resnet18", "digits", "all", changes={"data.size": 16})
    prepare("digits", params.data["digits"], folder)
    data = load(folder)
    rows = measure(arguments.seeds, arguments.epochs, data, arguments.work)
    counts = ", ".join(f"{len(split)} {name}" for name, split in data.splits.items())
    text = (
        f"Test accuracy and cross-entropy (nats) over all ten classes. {data.title}, {counts} "
        f"images of 3 x 16 x 16; resnet18 at width 0.25, {arguments.epochs} epochs, modules "
        f"fine-tuned for 10; mean of {arguments.seeds} seeds, the range of accuracies in brackets; "
        f"calibrated on the validation images; float32, {where()}.\n\n{table_of(rows)}\n"
    )
    print(text)
    if arguments.write:
        rows.to_csv(REPORTS / "merge.csv", index=False, float_format="%.6g", lineterminator="\n")
        (REPORTS / "merge.md").write_text(text)


if __name__ == "__main__":
    main()
