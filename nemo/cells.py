"""Where the pipeline keeps what it makes (ours). Paths only: nothing here reads or writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo.config import Method, Params

MODULAR: tuple[Method, ...] = ("mwt", "nemo")


@dataclass(frozen=True)
class Cell:
    """One training: a data set, a model, a method and a seed."""

    dataset: str
    model: str
    method: Method
    seed: int

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.model}/{self.method}-{self.seed}"


def cells(params: Params) -> Iterator[Cell]:
    """Every cell that the params list, standard ones first within a model."""
    order: tuple[Method, ...] = ("standard", "mwt", "nemo")
    for dataset in params.datasets:
        for model in params.models:
            for method in (m for m in order if m in params.methods):
                for seed in params.seeds:
                    yield Cell(dataset, model, method, seed)


@dataclass(frozen=True)
class Layout:
    """Folders below the project's root."""

    root: Path = Path()

    def data(self, dataset: str) -> Path:
        return self.root / "data" / dataset

    def _cell(self, cell: Cell) -> Path:
        return self.root / "runs" / cell.dataset / cell.model / f"{cell.method}-{cell.seed}"

    def train(self, cell: Cell) -> Path:
        return self._cell(cell) / "train"

    def masks(self, cell: Cell) -> Path:
        return self._cell(cell) / "masks"

    def module(self, cell: Cell, subset: str) -> Path:
        return self._cell(cell) / "modules" / subset

    def finetuned(self, cell: Cell, subset: str) -> Path:
        return self._cell(cell) / "finetuned" / subset

    def evaluation(self, dataset: str, model: str) -> Path:
        return self.root / "evaluation" / dataset / f"{model}.json"

    def report(self, profile: str) -> Path:
        return self.root / "reports" / profile
