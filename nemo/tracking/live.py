"""Curves while training: no store, however broken, may stop or noticeably slow a training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo.config import Params
from nemo.layout import Cell
from nemo.tracking.records import cell_record
from nemo.tracking.store import Store, log_points, one_line, patiently, points

FLUSH_SECONDS = 2.0  # a write costs 0.1 s, which must not slow epochs of half a second
_log = logging.getLogger(__name__)


class RunLogger:
    """Logs a training's epochs; once the store fails it warns a single time and stays silent."""

    def __init__(self, client: Any = None, run_id: str = "") -> None:
        self._client = client
        self._run_id = run_id
        self._pending: list[tuple[str, float, int]] = []
        self._flushed = 0.0

    def __call__(self, epoch: int, metrics: dict[str, float]) -> None:
        self.log_epoch(epoch, metrics)

    def log_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        """Log the epoch's row of history.csv, at most one write in two seconds."""
        if self._client is None:
            return
        self._pending += points([{**metrics, "epoch": epoch}])
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._try(self._flush)

    def finish(self, status: str) -> None:
        """Write what is pending and close the run."""
        if self._client is not None:
            self._try(self._flush)
        if self._client is not None:
            self._try(lambda: self._client.set_terminated(self._run_id, status))

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        log_points(self._client, self._run_id, pending)
        self._flushed = time.monotonic()

    def _try(self, action: Callable[[], None]) -> None:
        try:
            patiently(action)
        except Exception as error:  # whatever a store or its client raises: training goes on
            self._client = None
            _log.warning("MLflow: %s; training goes on without it", one_line(error))


@contextmanager
def training_run(
    params: Params, cell: Cell, *, enabled: bool = True, root: Path = Path()
) -> Iterator[RunLogger]:
    """The MLflow run of a training. Neither entering, logging nor leaving ever raises.

    A run that an interrupted training of the same params left open is continued.
    """
    logger = _open(params, cell, root) if enabled else RunLogger()
    try:
        yield logger
    except BaseException:
        logger.finish("FAILED")
        raise
    logger.finish("FINISHED")


def _open(params: Params, cell: Cell, root: Path) -> RunLogger:
    try:
        store = Store.connect(root)
        record = cell_record(params, cell, root)
        run_id = patiently(lambda: store.reopen_or_create(record))
        return RunLogger(store.client, run_id)
    except ImportError:
        _log.warning("MLflow is not installed: curves are in history.csv only")
    except Exception as error:  # whatever a store or its client raises: training goes on
        _log.warning("MLflow: %s; training goes on without it", one_line(error))
    return RunLogger()
