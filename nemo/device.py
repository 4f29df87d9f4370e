"""The device that params name."""

from __future__ import annotations

import torch

from nemo.config import ParamsError


def resolve_device(name: str) -> torch.device:
    """`auto` is the first of cuda, mps and cpu that is there.

    Raises:
        ParamsError: the named device is not there.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    kind = name.split(":")[0]
    index = int(name.partition(":")[2] or 0)
    if not there[kind] or (kind == "cuda" and index >= torch.cuda.device_count()):
        accepted = ", ".join(["auto", *(k for k, available in there.items() if available)])
        raise ParamsError(f"device: {name} is not available here; accepted: {accepted}")
    return torch.device(name)
