"""What the stages share."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from nemo.cells import Cell
from nemo.cli import main
from nemo.locks import locked


def run(command: str, *options: str) -> NoReturn:
    """Call one command of `nemo`; the process ends with its exit code.

    It waits for an orphan that does the same, which a killed dvc leaves behind. A training has its
    own lock, by what decides its result, and takes over what the orphan did.
    """
    digest = hashlib.sha256(" ".join(options).encode()).hexdigest()[:16]  # a name may be long
    lock = Path(".checkpoints") / f"{command}-{digest}.lock"
    try:
        with nullcontext() if command == "train" else locked(lock):
            main([command, *options])
    except OSError as error:  # of the lock; the command tells its own
        sys.exit(f"nemo: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:  # while waiting
        sys.exit(130)
    sys.exit(0)


def cell(dataset: str, model: str, method: str, seed: str) -> tuple[Cell, list[str]]:
    """The cell that DVC's matrix names, and the options that name it to `nemo`."""
    options = ["--dataset", dataset, "--model", model, "--method", method, "--seed", seed]
    return Cell(dataset, model, method, int(seed)), options


def run_modular(stage: str, folder: Callable[..., Path], names: list[str]) -> NoReturn:
    """Call `nemo STAGE` for a cell, and a subset where `names` has one, which makes `folder`.

    Where the plan has nothing to do for it, the folder stays empty: DVC builds stages from lists
    and cannot filter them, and a standard model, which has no masks, is in `methods` too.
    """
    subset = names[4:]
    this, options = cell(*names[:4])
    file = Path("plan", this.dataset, this.model, this.method, f"{stage}.json")
    if json.loads(file.read_text(encoding="utf-8")) is None:
        folder(this, *subset).mkdir(parents=True, exist_ok=True)
        print(f"{this.method}: nothing to do")
        sys.exit(0)
    run(stage, *options, *(f"--subset={one}" for one in subset))
