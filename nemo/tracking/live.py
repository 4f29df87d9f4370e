"""Curves while training: no store, however broken, may stop or noticeably slow a training.

A thread of its own writes to the store, because MLflow waits for minutes where a server answers
drop by drop or another process locks the database. Training waits for it once, at its end, and not
for long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

from nemo.cells import Cell
from nemo.config import Params
from nemo.models.registry import family_named
from nemo.settings import settings
from nemo.tracking.patience import Patience
from nemo.tracking.records import Point, Record, cell_key, curves, open_record
from nemo.tracking.store import Store, import_client, one_line

FLUSH_SECONDS = 2.0  # a write costs 0.1 s, too much for epochs of half a second
PATIENCE = 8.0  # seconds that MLflow may cost a training in all: its import, and the last writes
LAST_WRITES = 2.0  # of these, at least for the last writes
OnEpoch = Callable[[int, dict[str, float]], None]
_log = logging.getLogger(__name__)


class RunLogger:
    """Writes a training's epochs to the store from a thread; warns once where that fails."""

    def __init__(self, root: Path, key: str, record: Record, patience: float) -> None:
        self._root, self._key, self._record = root, key, record
        self._patience = max(patience, LAST_WRITES)
        self._queue: SimpleQueue[list[Point] | str] = SimpleQueue()  # points, at last a status
        self._warned = False
        self._writer = threading.Thread(target=self._write, name="mlflow", daemon=True)
        self._writer.start()

    def log_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        """Log the epoch's row of history.csv, in at most one write in two seconds."""
        self._queue.put(curves([{**metrics, "epoch": epoch}]))

    def finish(self, status: str) -> None:
        """Close the run; one whose store does not take it in time stays open, for `publish`."""
        self._queue.put(status)
        self._writer.join(self._patience)
        if self._writer.is_alive():
            self._warn("the store is too slow")

    def _write(self) -> None:
        try:
            store = Store.connect(self._root, Patience(self._patience))
            run_id = store.reopen_or_create(self._key, self._record)
            status = None
            while status is None:
                pending, status = self._collect()
                if pending:
                    store.log(run_id, pending)
            store.client.set_terminated(run_id, status)
        except Exception as error:  # whatever a store or its client raises: training goes on
            self._warn(one_line(error))

    def _collect(self) -> tuple[list[Point], str | None]:
        """The points of the next two seconds, and the status where training ends in them."""
        pending: list[Point] = []
        until = time.monotonic() + FLUSH_SECONDS
        while (left := until - time.monotonic()) > 0:
            try:
                item = self._queue.get(timeout=left)
            except Empty:
                break
            if isinstance(item, str):
                return pending, item
            pending += item
        return pending, None

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("MLflow: %s; training goes on without it", reason)


@contextmanager
def training_run(
    params: Params, cell: Cell, data_sha256: str, *, enabled: bool = True, root: Path = Path()
) -> Iterator[OnEpoch]:
    """The MLflow run of a training. Neither entering, logging nor leaving ever raises.

    A run that an interrupted training of the same params left open is continued.
    """
    logger = _open(params, cell, data_sha256, root) if enabled else None
    if logger is None:
        yield lambda epoch, metrics: None
        return
    try:
        yield logger.log_epoch
    except BaseException:
        logger.finish("FAILED")
        raise
    logger.finish("FINISHED")


def _open(params: Params, cell: Cell, data_sha256: str, root: Path) -> RunLogger | None:
    start = time.monotonic()
    try:
        import_client()  # here, as two threads must not import parts of one library at once
        values = settings(params, cell, family_named(cell.model))
        key = cell_key(params.profile, cell, values, data_sha256)
        record = open_record(params.profile, cell, params.base_of(cell.method).name, values)
        return RunLogger(root, key, record, PATIENCE - (time.monotonic() - start))
    except ImportError:
        _log.warning("MLflow is not installed: curves are in history.csv only")
    except Exception as error:  # whatever MLflow raises when imported: training goes on
        _log.warning("MLflow: %s; training goes on without it", one_line(error))
    return None
