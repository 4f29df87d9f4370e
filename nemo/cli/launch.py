"""Run a training in several processes: those that torchrun started, or our own (ours)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

from nemo.cli.failures import expected
from nemo.config import Params, check_params
from nemo.fields import ParamsError
from nemo.sections import FinetuneParams, TrainParams

GRACE_SECONDS = 10.0  # for processes to end by themselves once one has failed


def launch(
    params: Params,
    block: Literal["train", "finetune"],
    recipe: TrainParams | FinetuneParams,
    work: Callable[..., None],
    *args: Any,
) -> None:
    """Call `work(params, *args)` in every process of the training, and wait for all of them.

    torchrun's processes (RANK and WORLD_SIZE are set) join each other. Otherwise `recipe.processes`
    are started on this machine, unless it is 1: then `work` runs in this one.

    Args:
        recipe: the params' `block`, with what a variant changes of it.
        work: a function of a module, since processes of our own import it.

    Raises:
        ParamsError: that many processes do not share a batch evenly, or have no devices.
        ChildProcessError: a process was killed; the others have been ended.
        Exception: what `work` raises.
    """
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        _join_torchrun(params, block, recipe, work, args)
    elif recipe.processes == 1:
        work(params, *args)
    else:
        _check_devices(params.device, recipe.processes)
        _start(recipe.processes, params, work, args)


def _join_torchrun(
    params: Params,
    block: str,
    recipe: TrainParams | FinetuneParams,
    work: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    world = int(os.environ["WORLD_SIZE"])
    if recipe.processes not in (1, world):
        raise ParamsError(
            f"{block}.processes: {recipe.processes}, where torchrun runs {world}; "
            f"accepted: 1, {world}"
        )
    if recipe.batch_size % world:
        raise ParamsError(
            f"{block}.batch_size: {world} processes do not share {recipe.batch_size} evenly; "
            f"accepted: multiples of {world}"
        )
    if recipe.cuda_graphs and world > 1:
        raise ParamsError(f"{block}.cuda_graphs: true, with {world} processes; accepted: false")
    local, here = (int(os.environ.get(f"LOCAL_{name}", 0)) for name in ("RANK", "WORLD_SIZE"))
    _check_devices(params.device, here)
    try:
        _work_together(params, local, work, args)
    except ArithmeticError:  # all processes compute the same loss, and the first one says it
        if os.environ["RANK"] == "0":
            raise
        sys.exit(1)


def _work_together(
    params: Params, local: int, work: Callable[..., None], args: tuple[Any, ...], **group: Any
) -> None:
    """Join the process group and call `work`; `local` counts this machine's processes."""
    import torch
    import torch.distributed as dist

    from nemo.device import resolve_device

    cuda = resolve_device(params.device).type == "cuda"
    if cuda:
        torch.cuda.set_device(local)
    # the first process may wait for another trainer's lock; who ends is seen by who started it
    backend, patience = "nccl" if cuda else "gloo", timedelta(days=30)
    dist.init_process_group(backend, timeout=patience, **group)
    work(params, *args)
    dist.destroy_process_group()


def _check_devices(name: str, count: int) -> None:
    """Raise ParamsError unless `count` processes on this machine have a device each."""
    import torch

    from nemo.device import resolve_device

    device = resolve_device(name)
    if count > 1 and (device.type == "mps" or device.index is not None):
        raise ParamsError(f"device: {count} processes cannot share {device}; accepted: cpu, cuda")
    if device.type == "cuda" and count > torch.cuda.device_count():
        raise ParamsError(
            f"device: {count} processes, and {torch.cuda.device_count()} GPUs here; accepted: cpu"
        )


def _start(count: int, params: Params, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.multiprocessing.spawn import ProcessException, spawn

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    errors = multiprocessing.get_context("spawn").SimpleQueue()
    # params as plain values: pydantic's generic classes cannot be pickled
    handed = (count, store.port, errors, params.model_dump(), work, args)
    running = spawn(_worker, handed, count, join=False)
    try:
        while not running.join(grace_period=GRACE_SECONDS):
            pass
    except ProcessException as failed:
        if not errors.empty():
            raise errors.get() from None
        status = running.processes[failed.error_index].exitcode
        if status >= 0:
            raise
        raise ChildProcessError(
            f"process {failed.error_index} of {count} was killed ({signal.Signals(-status).name}), "
            "and the others were ended; a training resumes from its last epoch's checkpoint"
        ) from None
    finally:
        for process in running.processes:  # after SIGTERM or Ctrl-C they would go on
            process.terminate()
            process.join()


def _worker(
    rank: int,
    count: int,
    port: int,
    errors: Any,
    params: dict[str, Any],
    work: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    """One process of our own; an error that a user can cause goes to the one that started it."""
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from nemo.cli.main import ignore_warnings, leave_quickly

    threading.Thread(target=_end_with_parent, daemon=True).start()
    ignore_warnings()
    leave_quickly()
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    store = TCPStore("localhost", port, is_master=False)
    try:
        checked = check_params(params)
        _work_together(checked, rank, work, args, store=store, rank=rank, world_size=count)
    except Exception as error:
        if not expected(error):
            raise
        error.add_note(f"in process {rank}:\n{traceback.format_exc()}")
        errors.put(error)
        sys.exit(1)


def _end_with_parent() -> None:
    """Leave no process behind when the one that started it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
