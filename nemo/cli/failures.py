"""The errors that a user can cause, and what is said of them (ours)."""

from __future__ import annotations

from pathlib import Path

from nemo.cells import made_by

# what CUDA and MPS, the CPU, cuBLAS and cuDNN say, mostly in a plain RuntimeError
NO_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
TUNING = "finetune.batch_size"
SMALLER = {  # what a command takes less memory with
    "train": "train.batch_size",
    "run": f"train.batch_size or {TUNING}",
    "modularize": "--size",
    **dict.fromkeys(("finetune", "alternatives", "budgets", "granularity"), TUNING),
}


def expected(error: Exception) -> bool:
    """Whether a user can cause it; any other is a bug, and ends in a traceback."""
    return isinstance(error, ValueError | OSError | ArithmeticError) or _no_memory(error)


def text(error: Exception, command: str | None) -> str:
    """What is said of an error of a command; one of the system begins with the file, and where
    an earlier stage makes that, says which."""
    if _no_memory(error):
        key = SMALLER.get(command or "")
        return f"out of memory: try {f'a smaller {key}, or ' if key else ''}another device"
    if isinstance(error, OSError) and error.filename is not None:
        maker = made_by(Path(error.filename)) if isinstance(error, FileNotFoundError) else None
        hint = f"; run `nemo {maker}` first" if maker else ""
        return f"{error.filename}: {error.strerror}{hint}"
    return str(error)


def _no_memory(error: Exception) -> bool:
    """Told by the words: torch, whose error it is, costs seconds to import."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    return said or isinstance(error, MemoryError)
