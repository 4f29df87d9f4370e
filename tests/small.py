"""A standard and a NeMo cell on digits that train in seconds, with class masks and one module."""

from pathlib import Path

import pytest
import yaml

from nemo.cells import Cell, Layout
from nemo.config import check_params
from nemo.data import load, prepare
from nemo.pipeline import decompose, masks
from nemo.training.cell import train_cell

SHAPES = {
    "resnet18": {"width": 0.125},
    "vit_small": {"dim": 24, "depth": 2, "heads": 3, "patch": 4},
}
SUBSET = "3+1"


def raw_params(model, **changes):
    raw = yaml.safe_load(Path("params.yaml").read_text())
    raw["models"], raw["architecture"] = [model], {model: SHAPES[model]}
    raw["methods"], raw["subsets"] = ["standard", "nemo"], [SUBSET]
    raw["train"]["epochs"], raw["finetune"]["epochs"] = 3, 1
    raw["loss"]["alpha"] = 3.0
    raw["decompose"] = {}  # modules as they are cut
    return raw | changes


def small(root, model):
    """(params, the NeMo cell, its images, where its files are) below the folder `root`."""
    params = check_params(raw_params(model))
    cell, layout = Cell("digits", model, "nemo", 0), Layout(root)
    prepare("digits", params.data["digits"], layout.data("digits"))
    data = load(layout.data("digits"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for method in params.methods:
            one = Cell("digits", model, method, 0)
            train_cell(params, one, data, layout.train(one))
    masks.run(params, cell, layout)
    decompose.run(params, cell, SUBSET, layout)
    return params, cell, data, layout
