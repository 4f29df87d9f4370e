"""Stage evaluate: measure a cell, and leave one file of results in git."""

from __future__ import annotations

from pathlib import Path

from nemo.cells import Cell, Layout
from nemo.config import Params
from nemo.evaluation.evaluate import evaluate_cell
from nemo.files import write_json
from nemo.pipeline.inputs import images
from nemo.results import result_file
from nemo.training.checkpoint import checkpoints_root, sweep


def run(params: Params, cell: Cell, layout: Layout) -> Path:
    """Write the cell's file of results below `layout.root`; returns its path."""
    data = images(params, cell.dataset, layout)
    file = result_file(layout.root, params.profile, cell)
    write_json(file, evaluate_cell(params, cell, data, layout))
    sweep(checkpoints_root())
    return file
