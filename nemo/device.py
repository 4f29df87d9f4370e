"""The device that params name, and how to get the same numbers from it twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nemo.fields import ParamsError, check_device


def resolve_device(name: str) -> torch.device:
    """`auto` is the first of cuda, mps and cpu that is there.

    Raises:
        ParamsError: no device has that name, or it is not there.
    """
    try:
        check_device(name)
    except ValueError as error:
        raise ParamsError(f"device: {error}") from None
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
    if kind == "cuda":  # read when cuBLAS is first used; without it its sums are not repeatable
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device(name)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """While this is entered, a GPU computes the same bits from the same inputs, as a CPU does with
    one number of threads. torch warns of an operation that has no such way on a GPU."""
    if device.type != "cuda":
        yield
        return
    former = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic
    filled = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switches.fill_uninitialized_memory = False  # a search for mistakes, and slow
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(former, warn_only=warned)
        switches.fill_uninitialized_memory = filled
