"""Every alternative that params name, for every module of a cell, trained as the module is."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from nemo.alternatives import ALTERNATIVES, Alternative
from nemo.alternatives.context import Context
from nemo.alternatives.rows import Row, kept_rows, tuned
from nemo.cells import Cell, Layout
from nemo.config import STANDARD, Params
from nemo.data import Prepared
from nemo.module import files as modules
from nemo.trained import WEIGHTS


def alternatives(params: Params, cell: Cell, data: Prepared, layout: Layout) -> list[Row]:
    """A row for each class subset and each of `params.alternatives.kinds`.

    Args:
        params: those of the cell's method.

    Raises:
        OSError, ValueError: what an earlier stage makes is missing or damaged, or an alternative
            cannot be made of this model.
    """
    standard = replace(cell, method=STANDARD)
    files = [layout.train(cell) / WEIGHTS, layout.train(standard) / WEIGHTS]
    files += [layout.module(cell, subset) / modules.WEIGHTS for subset in params.subsets]
    rows: list[Row] = []
    with kept_rows("alternatives", params, cell, data, files) as keep:
        for subset in params.subsets:
            context = Context(params, cell, subset, data, layout)
            for kind in params.alternatives.kinds:
                make = partial(_measure, ALTERNATIVES.named(kind), context)
                rows += keep(f"{subset} {kind}", make)
    return rows


def _measure(kind: Alternative, context: Context) -> list[Row]:
    torch.manual_seed(context.cell.seed)
    model, subset = kind.make(context), context.subset
    context.check_size(kind, model)
    row = tuned(model, context.params, context.cell, context.data, subset, kind.name)
    return [{"alternative": kind.name, "subset": subset, **row}]
