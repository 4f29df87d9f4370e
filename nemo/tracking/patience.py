"""How long a store may take: seconds in all, and longer only while it answers (ours).

A thread does the work, since MLflow waits for minutes where a server answers drop by drop or
another process locks the database.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread
from typing import TypeVar

T = TypeVar("T")
ANSWERS = 40  # as many answers double the seconds
SILENCE = 0.3  # share of the seconds that may pass without an answer, once they are over
MAKING = 30.0  # seconds more for a new database on this machine's disk: nothing can answer yet


class Patience:
    """`seconds` in all for a store that does not answer; a fortieth of it more for each answer."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._start = self._last = time.monotonic()
        self._answers = 0
        self._making = 0.0

    def answered(self) -> None:
        self._answers += 1
        self._last = time.monotonic()

    @contextmanager
    def making(self) -> Iterator[None]:
        """While a database is made, which says nothing about whether the store answers."""
        start, self._making = time.monotonic(), MAKING
        yield
        self._making = time.monotonic() - start
        self._last = time.monotonic()

    @property
    def over(self) -> bool:
        now = time.monotonic()
        late = now - self._start - self._making - self._seconds
        if late <= 0:
            return False
        silent = now - self._last > SILENCE * self._seconds
        return silent or late > self._seconds * self._answers / ANSWERS


def in_time(work: Callable[[Patience], T], patience: Patience) -> T:
    """What `work` returns or raises, from a thread that is left alone once patience is over.

    Raises:
        TimeoutError: it is over.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work(patience))
        except BaseException as error:  # for the caller, whatever it is
            done.set_exception(error)

    Thread(target=run, name="mlflow", daemon=True).start()
    while not done.done():
        if patience.over:
            raise TimeoutError("the store is too slow")
        time.sleep(0.02)
    return done.result()
