"""What a figure was made with: revision, libraries and class of machine (ours)."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

CODE = ("nemo", "stages")


def provenance(device: torch.device) -> dict[str, Any]:
    """Of the figures being made now; no times, hosts or paths.

    `revision` ends with -dirty where the code differs from the commit, and is empty outside git.
    """
    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}, {machine}"
    return {
        "device": device.type,
        "machine": machine,
        "python": platform.python_version(),
        "revision": _revision(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
    }


def _revision() -> str:
    revision = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return f"{revision}-dirty" if revision and changed else revision


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, cwd=root, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
