"""Stage plan: write what decides the result of each stage.

It also removes what DVC has made of a subset, or of a table, that params have given up: the stages
that read the whole folder of a cell would find it here, and another clone would not. DVC's cache
keeps it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import yaml

from nemo.cells import Layout, cells
from nemo.config import EXTRAS, Params, load_params
from nemo.fields import ParamsError
from stages.common import run


def given_up(params: Params, lock: Path) -> Iterator[Path]:
    """The outputs in dvc.lock that are in the folder of a cell of `params`, and no longer its."""
    if not lock.is_file():
        return
    layout, wanted = Layout(), set()
    for cell in cells(params):
        wanted |= {layout.train(cell), layout.masks(cell)}
        for subset in params.subsets:
            wanted |= {layout.module(cell, subset), layout.finetuned(cell, subset)}
        asked = (name for name in EXTRAS if cell.method in getattr(params, name).of)
        wanted |= {layout.extra(cell, name).parent for name in asked}
    folders = {layout.cell(cell) for cell in cells(params)}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the file may be long
    content = yaml.load(lock.read_text(encoding="utf-8"), loader) or {}
    stages = (content.get("stages") or {}).values()
    outs = (out for stage in stages if stage for out in stage.get("outs") or ())
    for out in (Path(out["path"]) for out in outs):
        if out not in wanted and folders.intersection(out.parents) and out.is_dir():
            yield out


if __name__ == "__main__":
    with suppress(ParamsError, yaml.YAMLError):  # the command tells of the one, DVC of the other
        for folder in given_up(load_params(), Path("dvc.lock")):
            shutil.rmtree(folder)
    run("plan")
