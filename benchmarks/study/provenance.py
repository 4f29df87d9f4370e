"""What a figure of the study was made with."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from nemo.config import Params
from nemo.device import resolve_device


def provenance(params: Params) -> dict[str, Any]:
    """Of the figures being made now: revision, library and class of machine."""
    device = resolve_device(params.device)
    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}, {machine}"
    revision = _git("rev-parse", "--short=12", "HEAD")
    if _git(
        "status", "--porcelain", "--untracked-files=no", "--", "nemo", "benchmarks", "profiles"
    ):
        revision += "-dirty"
    return {
        "revision": revision,
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),
        "machine": machine,
        "threads": torch.get_num_threads(),
    }


def _git(*arguments: str) -> str:
    root = Path(__file__).parents[2]
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=root)
    return done.stdout.strip()
