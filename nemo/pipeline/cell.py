"""All stages of one cell, without DVC: several cells may be computed at once (ours).

Each step has a lock of its own, and is left out where its result is there and nothing that decides
it has changed. `nemo cells` lists the commands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo.cells import READ_STANDARD, Cell, Layout
from nemo.config import EXTRAS, STANDARD, Params
from nemo.files import read_json, write_json
from nemo.locks import locked
from nemo.pipeline import decompose, evaluate, extras, finetune, masks, prepare, train
from nemo.recipe import preparation, recipe
from nemo.results import result_file
from nemo.training.checkpoint import checkpoints_root

Say = Callable[[str], object]


def run(params: Params, cell: Cell, layout: Layout, say: Say) -> Path:
    """Compute what is missing of `cell`; returns its file of results."""
    steps = _Steps(params, cell, layout, say)
    made = [steps.trained(cell)]
    if params.base_of(cell.method).modular:
        find = partial(masks.run, params, cell, layout)
        chosen = steps.do("masks", layout.masks(cell), find, made)
        tuned = []
        none = {extra: type(getattr(params, extra))(of=[]) for extra in EXTRAS}
        for subset, text in params.subsets.items():
            one = params.model_copy(update={"subsets": {subset: text}, **none})
            cut = partial(decompose.run, params, cell, subset, layout)
            made.append(steps.do("decompose", layout.module(cell, subset), cut, [chosen], one))
            tune = partial(finetune.run, params, cell, subset, layout)
            out = layout.finetuned(cell, subset)
            tuned.append(steps.do("finetune", out, tune, made[-1:]))
        for extra in (name for name in EXTRAS if cell.method in getattr(params, name).of):
            before = list(made)
            if extra in READ_STANDARD:
                standard = Cell(cell.dataset, cell.model, STANDARD, cell.seed)
                before.append(steps.trained(standard))
            measure = partial(extras.run, extra, params, cell, layout)
            tuned.append(steps.do(extra, layout.extra(cell, extra).parent, measure, before))
        made += tuned
    out = result_file(layout.root, params.profile, cell)
    steps.do("evaluate", out, partial(evaluate.run, params, cell, layout), made)
    return out


class _Steps:
    """Runs what has not run. A step's digest holds those of the steps that it reads from, and
    nothing else, so that another cell finds the same digest of what they share."""

    def __init__(self, params: Params, cell: Cell, layout: Layout, say: Say) -> None:
        self.params, self.cell, self.layout, self.say = params, cell, layout, say

    def trained(self, cell: Cell) -> str:
        """The prepared images and the weights of `cell`."""
        params, layout, dataset = self.params, self.layout, cell.dataset
        decode = partial(prepare.run, params, dataset, layout)
        images = self._do(preparation(params, dataset), layout.data(dataset), decode, [])
        teach = partial(train.run, params, cell, layout)
        return self._do(recipe(params, cell, "train"), layout.train(cell), teach, [images])

    def do(
        self,
        stage: str,
        out: Path,
        step: Callable[[], Any],
        after: list[str],
        params: Params | None = None,
    ) -> str:
        """`params`: where some of what they have decides nothing here."""
        return self._do(recipe(params or self.params, self.cell, stage), out, step, after)

    def _do(self, made_of: Any, out: Path, step: Callable[[], Any], after: list[str]) -> str:
        where = [torch.__version__, self.params.device]
        text = json.dumps([*where, *after, made_of, str(out)], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        name = hashlib.sha256(str(out).encode()).hexdigest()[:16]
        done = checkpoints_root() / f"done-{name}.json"
        with locked(done.with_suffix(".lock")):
            if not (out.exists() and done.exists() and read_json(done) == digest):
                self.say(f"{out}")
                step()
                write_json(done, digest)
        return digest
