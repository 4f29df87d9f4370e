"""Checkpoints that survive a kill, outside the pipeline's outputs (ours).

A folder is keyed by everything that decides a training's result: params, data and code. It is
locked while in use, so that no second process trains the same cell, and removed on success.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parents[1]


class Checkpoint:
    """The last state of one training in `folder`, written to a temporary name and renamed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "last.pt"

    def save(self, state: dict[str, Any]) -> None:
        partial = self.file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.file)

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The saved state, or None where there is none."""
        if not self.file.exists():
            return None
        state: dict[str, Any] = torch.load(self.file, map_location=device, weights_only=True)
        return state


@contextmanager
def open_checkpoint(
    key: Mapping[str, Any], root: Path | None = None, keep: bool = False
) -> Iterator[Checkpoint]:
    """Lock the checkpoint folder of `key`, waiting for a process that holds it, and remove it on
    success unless it is to `keep`.

    Args:
        key: JSON values that decide the result; the package's own code is added to them.
        root: where the folders are; by default `.checkpoints` of the project (the folder that DVC
            names in DVC_ROOT, so that its temporary copies share it, else the current one).
    """
    root = root or Path(os.environ.get("DVC_ROOT", ".")) / ".checkpoints"
    text = json.dumps({**key, "code": code_hash(), "torch": torch.__version__}, sort_keys=True)
    folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the process that trains the same cell ({lock.name})", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir(exist_ok=True)
        (folder / "key.json").write_text(text)
        yield Checkpoint(folder)
        if not keep:
            shutil.rmtree(folder)


def code_hash() -> str:
    """SHA-256 of the code that trains: every Python file below `nemo/` but the views of results."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        relative = file.relative_to(PACKAGE)
        if relative.parts[0] not in ("cli", "report", "tracking"):
            digest.update(f"{relative}\0".encode() + file.read_bytes())
    return digest.hexdigest()
