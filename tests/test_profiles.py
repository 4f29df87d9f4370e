"""The paper profile is not run here; its models take one step with masks, at full width."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from nemo.cells import Cell, cells
from nemo.config import check_params, load_params
from nemo.data.prepared import Prepared, Split
from nemo.training.cell import train_cell

PAPER = load_params("profiles/paper.yaml")
ONE_STEP = check_params(
    PAPER.model_dump()
    | {"train": PAPER.train.model_dump() | {"epochs": 1, "at_chance": "keep"}, "device": "cpu"}
)
# the data sets differ in their images alone; a test of every pair would repeat each step
CELLS = [cell for cell in cells(ONE_STEP) if (cell.dataset, cell.seed) == ("cifar10", 0)]
# a standard model takes the same step without masks, and at full width a step is slow
STEPS = [cell for cell in CELLS if cell.method != "standard" or cell.model == "resnet18"]


def some_images() -> Prepared:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.tensor([0, 0, 1, 2]))  # few: at full width an image takes seconds
    names = tuple(map(str, range(10)))
    half = (0.5, 0.5, 0.5)
    one = Split(images[:1], torch.zeros(1, dtype=torch.long))
    splits = {"train": split, "val": one, "test": one}
    return Prepared("cifar10", "noise", names, (32, 32), half, half, True, 4, "", splits)


def test_the_paper_profile_has_the_papers_experiments():
    assert PAPER.models == ["simcnn", "vgg16", "rescnn", "resnet18", "vit_small", "deit_small"]
    assert PAPER.datasets == ["cifar10", "svhn"]
    assert PAPER.train.epochs.cnn == PAPER.train.epochs.transformer == 200
    assert not PAPER.data["svhn"].flip  # digits have a side
    assert len(CELLS) == 6 * 3


@pytest.mark.parametrize("cell", STEPS, ids=lambda cell: f"{cell.model}-{cell.method}")
def test_each_model_takes_a_step(cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))  # where checkpoints go
    train_cell(ONE_STEP, cell, some_images(), tmp_path / "train")
    metrics = json.loads((tmp_path / "train" / "metrics.json").read_text())
    assert metrics["epochs"] == 1
    assert metrics["parameters"] > 11e6
    assert (metrics["generator_parameters"] > 0) == (cell.method != "standard")
    history = (tmp_path / "train" / "history.csv").read_text().splitlines()
    loss = dict(zip(history[0].split(","), history[1].split(","), strict=True))["loss"]
    assert 0 < float(loss) < 100
    shutil.rmtree(tmp_path)  # hundreds of MB
