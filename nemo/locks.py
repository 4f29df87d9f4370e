"""Locks between processes, which the system takes back from one that is killed (ours)."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def locked(path: Path, wait: bool = True, say: bool = True) -> Iterator[None]:
    """Hold the lock file `path`, waiting for a process that holds it; it goes when nobody does.

    Raises:
        BlockingIOError: it is held, and one is not to wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                if say:
                    what = "waiting for another process that does the same"
                    print(f"{what} ({path})", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):  # who held it has removed it: this one locks nothing
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
