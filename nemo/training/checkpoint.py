"""Checkpoints that survive a kill, outside the pipeline's outputs (ours).

A folder is keyed by everything that decides a training's result: params, data and code. It is
locked while in use, so that no second process trains the same cell, and removed on success. Below
DVC a finished training is not safe yet, since a kill before DVC has recorded it makes DVC start it
again: its checkpoint stays until the next training begins or an evaluation ends, and until then
there is nothing left to train.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from nemo.files import write_bytes
from nemo.locks import locked

FINISHED = "finished"  # in a checkpoint folder: the training has ended


class Checkpoint:
    """The last state of one training in `folder`, written to a temporary name and renamed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "last.pt"

    def save(self, state: dict[str, Any]) -> None:
        content = io.BytesIO()  # on a full disk, torch's own writer may end the process
        torch.save(state, content)
        write_bytes(self.file, content.getbuffer())

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The saved state, or None where there is none.

        Raises:
            ValueError: the file is no whole checkpoint.
        """
        if not self.file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.file, map_location=device, weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError):
            raise ValueError(f"{self.file}: damaged; remove it to train from the start") from None
        return state


@contextmanager
def open_checkpoint(
    key: Mapping[str, Any], root: Path | None = None, keep: bool = False
) -> Iterator[Checkpoint]:
    """Lock the checkpoint folder of `key`, waiting for a process that holds it, and remove it on
    success unless it is to `keep` or DVC has to record it first. A training that failed in its
    numbers would fail again: its checkpoint goes too.

    Args:
        key: JSON values that decide the result, the code's hash among them.
        root: where the folders are; by default `checkpoints_root`.

    Raises:
        ValueError: the folder holds the checkpoint of another training.
    """
    root = root or checkpoints_root()
    text = json.dumps({**key, "torch": torch.__version__}, sort_keys=True)
    folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
    with locked(root / f"{folder.name}.lock"):
        sweep(root)
        written = folder / "key.json"
        if written.exists() and written.read_text() != text:
            raise ValueError(f"{folder}: a checkpoint of other params or other code; remove it")
        folder.mkdir(exist_ok=True)
        write_bytes(written, text.encode())
        try:
            yield Checkpoint(folder)
        except BaseException as error:
            if isinstance(error, ArithmeticError) or list(folder.iterdir()) == [written]:
                shutil.rmtree(folder)
            raise
        if not keep and "DVC_STAGE" in os.environ:
            (folder / FINISHED).touch()
        elif not keep:
            shutil.rmtree(folder)


def checkpoints_root() -> Path:
    """`.checkpoints` of the project: the folder that DVC names in DVC_ROOT, so that its temporary
    copies share it, else the current one."""
    return Path(os.environ.get("DVC_ROOT", ".")) / ".checkpoints"


def sweep(root: Path) -> None:
    """Remove the checkpoints of finished trainings, and the locks of killed processes."""
    done = {mark.parent.with_suffix(".lock") for mark in root.glob(f"*/{FINISHED}")}
    for lock in {*done, *root.glob("*.lock")}:
        with suppress(OSError), locked(lock, wait=False):  # in use, or another user's
            if lock in done:
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
