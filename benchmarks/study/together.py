"""Compute several units at once, in processes that share the jobs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.plan import Unit
from benchmarks.study.run import run_unit, unit_jobs
from nemo.config import Params
from nemo.data import load

_worker: dict[str, Any] = {}  # what a process of `run_together` works with


def run_together(
    units: list[Unit], profile: Params, data_folder: Path, processes: int
) -> Iterator[Path]:
    """Compute several units with that many processes; give each one's file as soon as it is there.

    Jobs that do not need each other run at the same time. A unit that fails stops no other one.

    Raises:
        RuntimeError: units that failed, and why, once all others are done.
    """
    data, context = load(data_folder), get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // processes)
    torch.set_num_threads(threads)  # of the evaluations here
    arguments = (profile.model_dump(), data_folder, threads)
    futures: dict[str, Future[None]] = {}
    failed: list[str] = []
    with ProcessPoolExecutor(processes, context, _start_worker, arguments) as pool:

        def submit(unit: Unit, step: int) -> list[Future[None]]:
            names = list(unit_jobs(unit, profile, data)[step])
            for name in names:
                if name not in futures:
                    futures[name] = pool.submit(_work, unit, step, name)
            return [futures[name] for name in names]

        running = [(unit, 0, submit(unit, 0)) for unit in units]
        while running:
            unit, step, jobs = running.pop(0)
            errors = [job.exception() for job in jobs if job.done() and job.exception()]
            if errors:
                failed.append(f"{unit.name}: {type(errors[0]).__name__}: {errors[0]}")
            elif not all(job.done() for job in jobs):
                running.append((unit, step, jobs))
                wait([job for *_, jobs in running for job in jobs if not job.done()], timeout=1)
            elif step < 2:
                running.append((unit, step + 1, submit(unit, step + 1)))
            else:
                yield run_unit(unit, profile, data)
    if failed:
        raise RuntimeError("; ".join(failed))


def _start_worker(raw: dict[str, Any], data_folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    _worker["profile"], _worker["data"] = Params.model_validate(raw), load(data_folder)


def _work(unit: Unit, step: int, name: str) -> None:
    begin = time.perf_counter()
    unit_jobs(unit, _worker["profile"], _worker["data"])[step][name]()
    print(f"{time.perf_counter() - begin:6.1f} s  {name}", flush=True)
