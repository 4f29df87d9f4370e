"""Stage train: train one cell, logging its curves to MLflow where asked to."""

from __future__ import annotations

import sys

from nemo.cells import Cell, Layout
from nemo.config import Params
from nemo.distributed import is_main
from nemo.pipeline.inputs import check_cut_pass, images
from nemo.tracking import training_run
from nemo.training.cell import idle, train_cell


def run(params: Params, cell: Cell, layout: Layout, track: bool = False) -> None:
    """What each process of a training does; the main one writes."""
    data = images(params, cell.dataset, layout)
    check_cut_pass(params, cell.method, data.classes)
    with training_run(params, cell, data.sha256, enabled=track and is_main()) as log_epoch:
        history = train_cell(params, cell, data, layout.train(cell), log_epoch)
    for line in idle(history) if is_main() else ():
        print(f"nemo: {cell.name}: {line}", file=sys.stderr)
