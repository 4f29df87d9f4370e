"""What the benchmarks share: clocks, peaks of memory, processes of their own, and their tables."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch

REPORTS = Path(__file__).resolve().parents[1] / "reports"
DEVICES: dict[str, Any] = {"default": "cpu", "choices": ("cpu", "cuda")}
Row = dict[str, Any]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the option --write; its description is the first line of a docstring."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--write", action="store_true", help="Write the tables to reports/, too.")
    return made


def where(device: str = "cpu") -> str:
    """What a table was measured on, for its caption."""
    threads, version = torch.get_num_threads(), torch.__version__.split("+")[0]
    kind = torch.backends.cpu.get_cpu_capability()  # such as AVX2
    on = torch.cuda.get_device_name() if device == "cuda" else f"{threads} CPU threads ({kind})"
    return f"{on}, torch {version}"


def show(name: str, caption: str, table: pd.DataFrame, write: bool) -> None:
    """Print a table, and write it to reports/ as name.csv and, below its caption, name.md."""
    text = f"{caption}\n\n{table.to_markdown(index=False)}\n"
    print(text)
    if write:
        table.to_csv(REPORTS / f"{name}.csv", index=False, lineterminator="\n")
        (REPORTS / f"{name}.md").write_text(text)


def medians(calls: Sequence[Callable[[], Any]], rounds: int, burst: int) -> list[float]:
    """Seconds of each call: medians over `rounds` turns of `burst` timed calls.

    In a turn each runs once before its clock starts, so that its weights are in the cache.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, spent in zip(calls, times, strict=True):
            call()
            for _ in range(burst):
                begin = time.perf_counter()
                call()
                spent.append(time.perf_counter() - begin)
    return [statistics.median(spent) for spent in times]


def timed(call: Callable[[], Any]) -> Row:
    """Seconds of one call, and the growth of the resident set over it in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM becomes the present size
    before, begin = _peak(), time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "peak_mb": (_peak() - before) / 1e6}


def _peak() -> int:
    """The largest resident set so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a call in a fresh process with as many threads as this one."""
    with get_context("spawn").Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.apply(function, args)
