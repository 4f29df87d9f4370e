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
    alternatives, budgets, gap, granularity, thresholds     rows, where params ask for them
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    StrictFloat,
    StrictInt,
    ValidationError,
)

from nemo.cells import Cell
from nemo.config import EXTRAS
from nemo.files import read_json

FORMAT = 1
TIMES = "times"  # the folder beside those of the data sets
History = list[dict[str, float]]
Row = dict[str, Any]


class MissingResultError(ValueError):
    """A result is absent, unreadable, or of other params: one line that says what makes it."""


def _numbered(row: dict[str, float]) -> dict[str, float]:
    if "epoch" not in row:
        raise ValueError("no epoch")
    return row


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


Number = StrictFloat | StrictInt
Epochs = list[Annotated[dict[str, Number], AfterValidator(_numbered)]]


class _Part(BaseModel):
    """What tables and MLflow read of a file; figures of a plugin's own may come besides."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, Number | bool | None]


class _Metrics(_Part):
    accuracy: Number
    parameters: Number
    flops: Number


class _Module(_Metrics):
    subset: str
    classes: list[int]
    history: Epochs


class _Alternative(_Metrics):
    subset: str
    alternative: str


class _Gap(_Part):
    subset: str


class _Budget(_Gap):
    competitor: str
    equal: Literal["parameters", "flops"]
    epochs: Number
    accuracy: Number | None
    device: str
    note: str = ""


class _Granularity(_Metrics):
    subset: str
    threshold: Number
    granularity: str


class _Threshold(_Part):
    threshold: Number


class _Step(_Part):
    method: str
    ms: Number
    ratio: Number


class _Latency(_Step):
    subset: str
    batch: int


class _Operation(_Part):
    what: str
    subset: str = ""
    seconds: Number


class _Times(BaseModel):
    training: list[_Step]
    latency: list[_Latency]
    operations: list[_Operation]


class _Layer(BaseModel):
    layer: str
    neurons: int
    kept: list[int]


class _Masks(BaseModel):
    layers: list[_Layer]
    class_nrr: list[Number]
    coupling_matrix: list[list[Number]]


class _Data(BaseModel):
    name: str
    title: str
    classes: list[str]
    counts: dict[str, int]
    size: list[int]
    sha256: str


class _Where(BaseModel):
    device: str = ""
    machine: str = ""


class _Made(BaseModel):
    trained: _Where


class _Cell(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    dataset: str
    model: str
    method: str
    seed: int


class _Body(BaseModel):
    """The whole of a file of results."""

    cell: _Cell
    profile: str
    base: str
    family: Literal["cnn", "transformer"]
    params: Row
    data: _Data
    made: _Made
    metrics: _Metrics
    subsets: dict[str, Number]
    history: Epochs
    masks: _Masks | None
    modules: list[_Module]
    alternatives: list[_Alternative] = []
    budgets: list[_Budget] = []
    gap: list[_Gap] = []
    granularity: list[_Granularity] = []
    thresholds: list[_Threshold] = []


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
    _check(_Body, body, path, remedy)
    return _parse(body)


def _check(kind: type[BaseModel], body: Any, path: Path, remedy: str) -> None:
    try:
        kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise MissingResultError(f"{path} is damaged ({why}); {remedy}") from None


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
    return root / "results" / profile / TIMES / cell.dataset / f"{cell.model}-{cell.seed}.json"


def read_times(path: Path) -> Row:
    """
    Raises:
        MissingResultError: the file holds no times.
    """
    remedy = "`python -m benchmarks.times` makes it, or leave it out"
    try:
        body: Row = read_json(path)
    except ValueError:
        raise MissingResultError(f"{path} is not JSON; {remedy}") from None
    _check(_Times, body, path, remedy)
    return body
