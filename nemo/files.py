"""Small files with stable bytes, and folders that appear whole or not at all (ours)."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def rounded(value: Any, digits: int = 6) -> Any:
    """Every float in a nest of dicts and lists to that many significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Sorted keys, an indent of 1, floats to 6 significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (json.dumps(rounded(value), indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    """
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); make it again") from None


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """The whole file or none, through a temporary name."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            partial.write_bytes(content)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One line per row; the columns are those of the first row."""
    with writing(path), path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rounded(list(rows)))


def read_csv(path: Path) -> list[dict[str, float]]:
    """A dict of numbers per row; empty fields are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else than numbers.
    """
    with path.open(newline="", encoding="utf-8") as file:
        try:
            rows = csv.DictReader(file)
            return [{k: float(v) for k, v in row.items() if k and v} for row in rows]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: damaged ({error}); make it again") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file where it cannot be written: a full disk, a folder that may not be changed.

    The writer of safetensors has an error of its own for that.

    Raises:
        OSError: of `path`.
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends without an error.

    Processes that write one folder wait for each other.

    What was at `out` before is moved away whole, so that no kill leaves a part of it, and comes
    back where the new one cannot take its place. A link to a folder stays a link.
    """
    from nemo.locks import locked  # POSIX only; `nemo.load` runs anywhere

    out = out.resolve() if out.is_symlink() else out
    with locked(out.with_name(f".{out.name}.lock.partial")), _replacing(out) as partial:
        yield partial


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    partial = out.with_name(f".{out.name}.partial")
    former = out.with_name(f".{out.name}.former.partial")
    if former.is_dir() and not out.exists():  # a process was killed between the two moves
        former.replace(out)
    for rest in (partial, former):
        shutil.rmtree(rest, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):  # safetensors writes for its owner's eyes only
            file.chmod(0o755 if file.is_dir() else 0o644)
        if out.is_dir():
            out.replace(former)
        partial.replace(out)
        shutil.rmtree(former, ignore_errors=True)
    except BaseException:
        if former.is_dir() and not out.exists():
            former.replace(out)
        shutil.rmtree(partial, ignore_errors=True)
        raise
