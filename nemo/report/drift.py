"""Do regenerated tables still say what the committed ones say?

Another CPU rounds differently, after some epochs that is like another seed. So what follows from
the architecture alone must be equal, and what training decides has a tolerance: each metric's own.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from nemo.forms import EXACT
from nemo.report.table import SEED, Table
from nemo.report.tables import T1, TABLES


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
        if len(absent) == 1 or (absent and table is T1):
            lines += [f"{path.as_posix()} is missing" for path in absent]
        elif not absent:
            lines += _compare(table, *(_read(table, path) for path in paths))
    return lines


def _read(table: Table, path: Path) -> pd.DataFrame:
    keys = dict.fromkeys(table.key_names, str)
    frame = pd.read_csv(path, dtype=keys, keep_default_na=False, na_values=[""])
    texts = [name for name in (*table.key_names, *table.texts) if name in frame]
    return frame.fillna(dict.fromkeys(texts, ""))


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
    texts = [name for name in table.texts if name in fresh]  # what computed it may be another
    new, old = (f.set_index(table.key_names).drop(columns=texts) for f in (fresh, committed))
    lines = [f"{name}: {_named(key)} is new" for key in new.index.difference(old.index)]
    lines += [f"{name}: {_named(key)} is gone" for key in old.index.difference(new.index)]
    if new.index.has_duplicates or old.index.has_duplicates:
        lines.append(f"{name}: a row occurs twice")
    tolerances = {metric.name: metric.tolerance for metric in table.metrics}
    rows = [dict(zip(f.index, f.to_dict("records"), strict=True)) for f in (new, old)]
    for key in old.index.intersection(new.index):
        for column in old.columns:
            now, then = (float(row[key][column]) for row in rows)
            tolerance = tolerances.get(column, EXACT)
            if not tolerance.admits(now, then):
                allowed = tolerance.absolute + tolerance.relative * abs(then)
                lines.append(
                    f"{name}: {_named(key)}: {column} was {then:.6g}, is {now:.6g}, "
                    f"allowed ±{allowed:.3g} ({tolerance.why})"
                )
    return lines


def _named(key: tuple[str, ...]) -> str:
    *names, seed = key
    return f"{' '.join(filter(None, names))} {SEED} {seed}"
