"""`check` finds each kind of drift, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from nemo.forms import EXACT, Tolerance
from nemo.metrics import METRICS
from nemo.report.collect import collect
from nemo.report.drift import check
from nemo.report.table import csv_text
from nemo.report.tables import frames
from tests.report.fake import make_params, make_results

Change = Callable[[pd.DataFrame], pd.DataFrame]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    params = make_params()
    make_results(tmp_path, params)
    tables = frames(collect(params, tmp_path))
    fresh, committed = tmp_path / "fresh", tmp_path / "committed"
    for folder in (fresh, committed):
        folder.mkdir()
        for name, frame in tables.items():
            (folder / f"{name}.csv").write_text(csv_text(frame))
    return fresh, committed


def change(folder: Path, table: str, how: Change) -> None:
    path = folder / f"{table}.csv"
    how(pd.read_csv(path, dtype=object)).to_csv(path, index=False)


def put(column: str, row: int, value: object) -> Change:
    def how(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[row, column] = value
        return frame

    return how


def test_equal_tables_do_not_drift(folders: tuple[Path, Path]) -> None:
    assert check(*folders) == []


def test_row_order_does_not_matter(folders: tuple[Path, Path]) -> None:
    change(folders[0], "T2-modules", lambda frame: frame.iloc[::-1])
    assert check(*folders) == []


@pytest.mark.parametrize(
    ("table", "how", "text"),
    [
        ("T1-models", put("accuracy", 0, 0.90), "accuracy was 0.95, is 0.9, allowed ±0.03"),
        (
            "T1-models",
            put("parameters", 0, 704_001),
            "parameters was 704000, is 704001, allowed ±0 ",
        ),
        ("T1-models", put("neurons", 3, 641), "neurons was 640, is 641"),
        ("T1-models", put("layers", 2, 17), "layers was 16, is 17"),
        ("T1-models", put("nrr", 2, None), "nrr was 0.2, is nan"),
        ("T1-models", put("nrr", 0, 0.2), "nrr was nan, is 0.2"),
        ("T2-modules", put("classes", 0, 3), "classes was 2, is 3"),
        ("T2-modules", put("certificate", 2, 1e-6), "certificate was 2.5e-14, is 1e-06"),
        ("T2-modules", put("parameters", 2, 9_000), "parameters was 91520, is 9000"),
        ("T2-modules", put("model", 0, "vgg16"), "tiny vgg16 0+1 standard seed 0 is new"),
        ("T2-modules", lambda frame: frame.drop(index=9), "tiny resnet18 all mwt seed 1 is gone"),
        ("T1-models", lambda frame: frame.drop(columns="nrr"), "column nrr is gone"),
        ("T1-models", lambda frame: frame.assign(speed=1), "column speed is new"),
        ("T1-models", lambda frame: frame[frame.columns[::-1]], "the columns changed places"),
        ("T1-models", lambda frame: pd.concat([frame, frame[:1]]), "a row occurs twice"),
    ],
)
def test_each_kind_of_drift_is_one_line(
    folders: tuple[Path, Path], table: str, how: Change, text: str
) -> None:
    change(folders[0], table, how)
    found = [line for line in check(*folders) if text in line]
    assert len(found) == 1
    assert found[0].startswith(f"{table}.csv: ")


def test_a_missing_table_is_drift(folders: tuple[Path, Path]) -> None:
    (folders[1] / "T2-modules.csv").unlink()
    (line,) = check(*folders)
    assert line.endswith("committed/T2-modules.csv is missing")


def test_within_tolerance_is_no_drift(folders: tuple[Path, Path]) -> None:
    change(folders[0], "T1-models", put("accuracy", 0, 0.98))
    change(folders[0], "T2-modules", put("certificate", 2, 9e-14))
    assert check(*folders) == []


def test_what_computed_a_row_may_be_another_device(folders: tuple[Path, Path]) -> None:
    change(folders[0], "T1-models", put("device", 0, "GPU"))
    assert check(*folders) == []


def test_a_tolerance_says_why() -> None:
    assert all(metric.tolerance.why for metric in METRICS.values())


def test_nothing_agrees_with_nothing_only() -> None:
    assert EXACT.admits(math.nan, math.nan)
    assert not Tolerance(1, 0, "wide").admits(math.nan, 0.0)
    assert not EXACT.admits(math.inf, 1.0)
    assert EXACT.admits(math.inf, math.inf)
