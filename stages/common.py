"""What the stages of modular cells share."""

from __future__ import annotations

import hashlib
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from nemo.cells import Cell
from nemo.cli import main
from nemo.config import ParamsError, load_params
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
    return Cell(dataset, model, method, int(seed)), options  # type: ignore[arg-type]


def leave_out(method: str, out: Path) -> None:
    """Where `methods` does not list a method, write an empty folder and end.

    DVC can build stages from a list but not filter them, and one block per method is what lets each
    track only its own params.
    """
    try:
        methods = load_params().methods
    except ParamsError as error:
        sys.exit("\n".join(f"nemo: {line}" for line in str(error).splitlines()))
    if method not in methods:
        out.mkdir(parents=True, exist_ok=True)
        print(f"{method} is not among methods: nothing to do")
        sys.exit(0)
