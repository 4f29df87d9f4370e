"""Rows of tables whose models are fine-tuned: how each is measured, and kept should we be killed.

A row is minutes of work and a cell has dozens. Finished ones wait in a checkpoint folder, outside
DVC's outputs, and are removed with it once all are there (ours).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nemo.cells import Cell
from nemo.config import Params
from nemo.cost import count_flops, count_parameters
from nemo.data import Batches, Prepared, parse_subset
from nemo.device import resolve_device
from nemo.files import read_json, write_json
from nemo.masking.sites import head_names
from nemo.models import family_named
from nemo.predict import accuracy, predict
from nemo.recipe import measuring
from nemo.training.checkpoint import open_checkpoint
from nemo.training.finetune import finetune

Row = dict[str, Any]
Keep = Callable[[str, Callable[[], list[Row]]], list[Row]]


def tuned(
    model: nn.Module, params: Params, cell: Cell, data: Prepared, subset: str, what: str
) -> Row:
    """Size, and test accuracy before and after the fine-tuning that a module gets.

    Args:
        model: its logits are those of the subset's classes; it is fine-tuned in place.
        what: of the subset it is, for the progress bar.
    """
    part = data.restrict(parse_subset(params.text_of(subset), data.classes))
    device = resolve_device(params.device)
    test = Batches(part.splits["test"], data.mean, data.std, 256, device=device)
    heads = head_names(model, len(part.classes)) if params.finetune.head == "new" else []
    row: Row = {
        "parameters": count_parameters(model),
        "flops": count_flops(model, torch.zeros(1, 3, *data.size)),
        "accuracy_step0": accuracy(*predict(model.to(device), test)),
    }
    family, title = family_named(cell.model), f"{cell.name} {subset} {what}"
    history, metrics = finetune(model, part, family, params, cell.seed, title, heads=heads)
    row |= {**metrics, "accuracy": accuracy(*predict(model, test))}
    if params.finetune.watch_test:
        row["best_test_accuracy"] = max(epoch["test_accuracy"] for epoch in history)
    return row


@contextmanager
def kept_rows(
    extra: str, params: Params, cell: Cell, data: Prepared, files: Iterable[Path]
) -> Iterator[Keep]:
    """A function (name, make) -> rows: those kept under the name, or else made, and kept.

    Args:
        extra: whose rows they are, a section of params.
        files: what else decides them: weights, masks and modules of earlier stages.
    """
    key = {
        "rows": extra,
        "cell": cell.name,
        "device": params.device,
        "recipe": measuring(params, cell, extra),
        "data": [data.sha256, data.flip, data.crop],
        "files": [_digest(file) for file in files],
    }
    with open_checkpoint(key) as checkpoint:
        file = checkpoint.folder / "rows.json"
        rows: dict[str, list[Row]] = read_json(file) if file.exists() else {}

        def keep(name: str, make: Callable[[], list[Row]]) -> list[Row]:
            if name not in rows:
                rows[name] = make()
                write_json(file, rows)
            return rows[name]

        yield keep


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except FileNotFoundError:
        stage = "train" if file.parent.name == "train" else "decompose"
        raise FileNotFoundError(f"{file.parent}: not there; run `nemo {stage}` first") from None
