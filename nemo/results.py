"""Finished results: one small JSON file per cell, which names the params that made it (ours).

`results/<profile>/<dataset>/<model>/<method>-<seed>.json` is written by the evaluate stage and kept
in git. Tables, figures, page and MLflow are made of these files alone, on any machine. This module
imports no torch and no pandas.

What a file holds (`FORMAT` 1):

    format, profile     1, and the profile that it belongs to
    cell                {dataset, model, method, seed}; method may be a variant
    base                the method that a variant is one of; else the method itself
    family              cnn or transformer: whose value `params` has where params.yaml has two
    params              {dotted key: value}: everything that decides the results, as it was then
    data                {name, title, classes, counts, size, sha256} of the images
    made                {trained, evaluated}: revision, torch, python, machine, threads, device
    metrics             of the whole model: accuracy, val_accuracy, parameters, flops, nrr, ...
    subsets             {subset: test accuracy of the whole model restricted to its classes}
    history             a row per epoch of training
    masks               the class masks' figures, layer by layer; null for a standard model
    modules             a dict per class subset: its metrics, and `history` of its fine-tuning
    alternatives, gap, granularity, thresholds      rows, where params ask for them
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo.cells import Cell

FORMAT = 1
TIMES = "times"  # the folder beside those of the data sets
History = list[dict[str, float]]
Row = dict[str, Any]


class MissingResultError(ValueError):
    """A result is absent, unreadable, or of other params: one line that says what makes it."""


@dataclass(frozen=True)
class ModuleResult:
    """One module: its metrics and the history of its fine-tuning."""

    subset: str
    metrics: Row
    history: History


@dataclass(frozen=True)
class CellResult:
    """One file of results."""

    cell: Cell
    profile: str
    base: str
    family: str
    params: Row
    data: Row
    made: Row
    metrics: Row
    subsets: dict[str, float]
    history: History
    masks: Row | None
    modules: list[ModuleResult]
    extras: dict[str, list[Row]] = field(default_factory=dict)  # alternatives, gap, ...

    @property
    def modular(self) -> bool:
        return self.masks is not None


EXTRAS = ("alternatives", "gap", "granularity", "thresholds")


def result_file(root: Path, profile: str, cell: Cell) -> Path:
    folder = root / "results" / profile / cell.dataset / cell.model
    return folder / f"{cell.method}-{cell.seed}.json"


def read_result(path: Path) -> CellResult:
    """
    Raises:
        MissingResultError: there is no such file, or it is not one of results.
    """
    remedy = "`dvc repro` makes it, or `nemo evaluate` by hand (nemo evaluate --help)"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingResultError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise MissingResultError(f"{path} ({error.strerror}); {remedy}") from None
    except ValueError:
        raise MissingResultError(f"{path} is not JSON; {remedy}") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise MissingResultError(f"{path} holds no results of format {FORMAT}; {remedy}")
    try:
        return _parse(body)
    except (KeyError, TypeError) as error:
        raise MissingResultError(f"{path} is damaged ({error}); {remedy}") from None


def _parse(body: Row) -> CellResult:
    modules = [
        ModuleResult(m["subset"], {k: v for k, v in m.items() if k != "history"}, m["history"])
        for m in body["modules"]
    ]
    names = ("profile", "base", "family", "params", "data", "made", "metrics", "subsets", "history")
    return CellResult(
        Cell(**body["cell"]),
        **{name: body[name] for name in names},
        masks=body["masks"],
        modules=modules,
        extras={name: body[name] for name in EXTRAS if name in body},
    )


def result_files(root: Path, profile: str) -> Iterator[Path]:
    """Every file of results of a profile, in a fixed order."""
    folder = root / "results" / profile
    for path in sorted(folder.glob("*/**/*.json")):
        if path.relative_to(folder).parts[0] != TIMES:
            yield path


def times_file(root: Path, profile: str, cell: Cell) -> Path:
    """Where `benchmarks.times` keeps what the cells of a model and seed cost, by any method."""
    folder = root / "results" / profile / TIMES / cell.dataset
    return folder / f"{cell.model}-{cell.seed}.json"
