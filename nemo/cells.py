"""Where the pipeline keeps what it makes (ours). Paths only: nothing here reads or writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo.config import EXTRAS, STANDARD, Params

READ_STANDARD = {"alternatives", "budgets"}  # they begin with the standard model, another cell


@dataclass(frozen=True)
class Cell:
    """One training: a data set, a model, a method and a seed."""

    dataset: str
    model: str
    method: str  # as params.yaml lists it: a registered one, or a variant
    seed: int

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.model}/{self.method}-{self.seed}"


def cells(params: Params) -> Iterator[Cell]:
    """Every cell that the params list, the standard one first within a model."""
    methods = sorted(params.methods, key=lambda method: method != STANDARD)
    for dataset in params.datasets:
        for model in params.models:
            for method in methods:
                for seed in params.seeds:
                    yield Cell(dataset, model, method, seed)


def targets(params: Params, cell: Cell) -> Iterator[str]:
    """DVC's names of the stages that read nothing of other cells, in the order they run in."""
    name = f"{cell.dataset}-{cell.model}-{cell.method}-{cell.seed}"
    yield from (f"train@{name}", f"masks@{name}")
    for subset in params.subsets:
        yield from (f"decompose@{name}-{subset}", f"finetune@{name}-{subset}")
    extras = {extra for extra in EXTRAS if cell.method in getattr(params, extra).of}
    yield from (f"{extra}@{name}" for extra in sorted(extras - READ_STANDARD))
    if not extras & READ_STANDARD:
        yield f"evaluate@{name}"


def made_by(file: Path) -> str | None:
    """The command that makes a file in the folder of a cell; None of any other file."""
    makers = {"modules": "decompose", "finetuned": "finetune"}
    makers |= {name: name for name in ("train", "masks", *EXTRAS)}
    folders = file.parts[-3:-1] if file.parts[:1] == ("runs",) else ()
    return next((makers[folder] for folder in folders if folder in makers), None)


@dataclass(frozen=True)
class Layout:
    """Folders below the project's root; prepared images may have a root of their own."""

    root: Path = Path()
    images: Path | None = None

    def data(self, dataset: str) -> Path:
        return (self.images or self.root) / "data" / dataset

    def cell(self, cell: Cell) -> Path:
        return self.root / "runs" / cell.dataset / cell.model / f"{cell.method}-{cell.seed}"

    def train(self, cell: Cell) -> Path:
        return self.cell(cell) / "train"

    def masks(self, cell: Cell) -> Path:
        return self.cell(cell) / "masks"

    def module(self, cell: Cell, subset: str) -> Path:
        return self.cell(cell) / "modules" / subset

    def finetuned(self, cell: Cell, subset: str) -> Path:
        return self.cell(cell) / "finetuned" / subset

    def extra(self, cell: Cell, name: str) -> Path:
        """Rows that params ask for besides: alternatives, budgets, gap, ..."""
        return self.cell(cell) / name / "rows.json"

    def report(self, profile: str) -> Path:
        return self.root / "reports" / profile
