"""Stage plan: one small file for each stage of each cell, which says what decides its result.

DVC runs a stage again when its file here changes. So a change of params or code re-runs exactly
what it decides, variants that do not override it included. `dvc repro plan`, then `dvc status`,
say what that is.
"""

from __future__ import annotations

from pathlib import Path

from nemo.config import Params
from nemo.fields import ParamsError
from nemo.files import new_folder, write_json
from nemo.pipeline.inputs import check_files, check_known_classes
from nemo.recipe import plan

ALWAYS = "report.json"  # in every plan


def run(params: Params, out: Path) -> int:
    """Write the folder `out` anew; returns the number of files.

    Raises:
        DataError, ParamsError: params do not fit classes that are known already, or name files that
            DVC does not compare; or `out` holds something, and it is no plan.
    """
    _check_replaceable(out)
    check_files(params)
    check_known_classes(params)
    files = 0
    with new_folder(out) as folder:
        for name, recipe in plan(params):
            write_json(folder / name, recipe)
            files += 1
    return files


def _check_replaceable(out: Path) -> None:
    empty = out.is_dir() and not any(out.iterdir())
    only_json = all(file.suffix == ".json" for file in out.rglob("*") if file.is_file())
    if out.exists() and not empty and not (only_json and (out / ALWAYS).is_file()):
        raise ParamsError(f"--out: {out} exists and is no plan; name another folder, or remove it")
