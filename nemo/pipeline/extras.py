"""Stages beside the seven: what more the tables show of a cell, where params ask for it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from nemo.cells import Cell, Layout
from nemo.config import Params
from nemo.files import new_folder, write_json
from nemo.pipeline.inputs import images
from nemo.recipe import MEASURES


def run(name: str, params: Params, cell: Cell, layout: Layout) -> list[dict[str, Any]]:
    """Write the rows of one kind for `cell`, and return them."""
    data = images(params, cell.dataset, layout)
    measure = getattr(import_module(MEASURES[name]), name)
    rows: list[dict[str, Any]] = measure(params.for_method(cell.method), cell, data, layout)
    out = layout.extra(cell, name)
    with new_folder(out.parent) as folder:
        write_json(folder / out.name, rows)
    return rows
