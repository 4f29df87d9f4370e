"""Do regenerated tables still say what the committed ones say?

Another CPU rounds differently, after some epochs that is like another seed. So what follows from
the architecture alone must be equal, and what training decides has a tolerance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from nemo.report.table import TABLES, Table


@dataclass(frozen=True)
class Tolerance:
    """Two values agree when they differ by at most `absolute + relative * |committed|`."""

    absolute: float
    relative: float
    why: str

    def admits(self, fresh: float, committed: float) -> bool:
        if math.isnan(fresh) or math.isnan(committed):
            return math.isnan(fresh) and math.isnan(
                committed
            )  # an empty field agrees with its like
        allowed = self.absolute + self.relative * abs(committed)
        return fresh == committed or abs(fresh - committed) <= allowed + 1e-12


EXACT = Tolerance(0, 0, "follows from params alone")
ACCURACY = Tolerance(0.03, 0, "a trained model's accuracy over seeds, 360 or more test images")
SUBSET = Tolerance(0.06, 0, "few test images: a subset of two classes has about 70")
MASKS = Tolerance(0.12, 0, "which neurons survive differs from seed to seed more than accuracy")
SIZE = Tolerance(0, 0.35, "a module's size follows its masks, layer by layer")
TOLERANCES: dict[str, dict[str, Tolerance]] = {
    "modular": {
        "accuracy": ACCURACY,
        "loss_points": Tolerance(4, 0, "the difference of two accuracies, in points"),
        "nrr": MASKS,
        "cohesion": MASKS,
        "coupling": MASKS,
        "dead_layers": Tolerance(3, 0, "a layer near the threshold dies or lives by chance"),
    },
    "modules": {
        "accuracy_standard": SUBSET,
        "accuracy_modular": SUBSET,
        "accuracy_step0": Tolerance(0.4, 0, "before fine-tuning the mask gap decides, by chance"),
        "accuracy": SUBSET,
        "nrr": MASKS,
        "parameters": SIZE,
        "parameters_ratio": SIZE,
        "flops": SIZE,
        "flops_ratio": SIZE,
        "certificate": Tolerance(1e-9, 0, "rounding of float64; the bound that exactness means"),
    },
}  # a column that is not listed must be EXACT


def check(fresh: Path, committed: Path) -> list[str]:
    """Compare the CSV tables of two reports.

    Returns:
        One line for every missing or extra table, column or row and every value that is out of
        tolerance; an empty list when nothing drifted.
    """
    lines: list[str] = []
    for table in TABLES:
        paths = [folder / f"{table.name}.csv" for folder in (fresh, committed)]
        absent = [path for path in paths if not path.is_file()]
        if absent:
            lines += [f"{path.as_posix()} is missing" for path in absent]
            continue
        lines += _compare(table, *(_read(table, path) for path in paths))
    return lines


def _read(table: Table, path: Path) -> pd.DataFrame:
    return pd.read_csv(
        path, dtype=dict.fromkeys(table.key_names, str), keep_default_na=False, na_values=[""]
    )


def _compare(table: Table, fresh: pd.DataFrame, committed: pd.DataFrame) -> list[str]:
    name = f"{table.name}.csv"
    if list(fresh.columns) != list(committed.columns):
        added = [c for c in fresh.columns if c not in committed.columns]
        lost = [c for c in committed.columns if c not in fresh.columns]
        return [
            *(f"{name}: column {c} is new" for c in added),
            *(f"{name}: column {c} is gone" for c in lost),
        ] or [f"{name}: the columns changed places"]
    missing_keys = [key for key in table.key_names if key not in fresh.columns]
    if missing_keys:
        return [f"{name}: no column {key}" for key in missing_keys]
    new, old = _by_key(table, fresh), _by_key(table, committed)
    lines = [f"{name}: {_named(key)} is new" for key in new if key not in old]
    lines += [f"{name}: {_named(key)} is gone" for key in old if key not in new]
    if len(new) < len(fresh) or len(old) < len(committed):
        lines.append(f"{name}: a row occurs twice")
    for key in old:
        if key in new:
            lines += _differences(table, key, new[key], old[key])
    return lines


def _by_key(table: Table, frame: pd.DataFrame) -> dict[tuple[str, ...], pd.Series[float]]:
    keys = frame[table.key_names].astype(str).itertuples(index=False, name=None)
    values = frame.drop(columns=table.key_names)
    return {key: values.iloc[row] for row, key in enumerate(keys)}


def _differences(
    table: Table, key: tuple[str, ...], fresh: pd.Series[float], committed: pd.Series[float]
) -> list[str]:
    lines = []
    for column in committed.index:
        tolerance = TOLERANCES[table.name].get(str(column), EXACT)
        now, then = float(fresh[column]), float(committed[column])
        if not tolerance.admits(now, then):
            allowed = tolerance.absolute + tolerance.relative * abs(then)
            lines.append(
                f"{table.name}.csv: {_named(key)}: {column} was {then:.6g}, is {now:.6g}, "
                f"allowed ±{allowed:.3g} ({tolerance.why})"
            )
    return lines


def _named(key: tuple[str, ...]) -> str:
    *names, seed = key
    return f"{' '.join(names)} seed {seed}"
