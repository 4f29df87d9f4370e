"""The MLflow store: found or made, and written one run at a time (ours)."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nemo.locks import locked
from nemo.tracking.patience import Patience
from nemo.tracking.records import Point, Record, digest

DEFAULTS = {  # unless the user set them; without the first two a dead server hangs for minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_MODEL_CATALOG_URI": "",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
KEY, RESULTS, ROLE, FORMER = "nemo.key", "nemo.results", "role", "former"
BATCH = 800  # points in one call; MLflow takes 1,000 metrics, params and tags together
LOCKED = (0.2, 0.5, 1.0, 2.0)  # seconds to wait where another process holds the database


class TrackingError(ValueError):
    """The tracking store cannot be used; the message says why."""


class Client:
    """MLflow's client; each call waits for a locked database, and tells when it was answered."""

    def __init__(self, client: Any, answered: Callable[[], None]) -> None:
        self._client, self._answered = client, answered

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            for wait in (*LOCKED, None):
                try:
                    answer = method(*arguments, **options)
                except Exception as error:  # wrapped in MLflow's own kind; the text tells
                    if wait is None or "locked" not in str(error):
                        raise
                    time.sleep(wait)
                else:
                    self._answered()
                    return answer

        return call


@dataclass
class Store:
    """One experiment of an MLflow store.

    Attributes:
        place: what messages call it: the database's path, or the server's address.
        lock: a file that writers on this machine lock, one after the other.
    """

    client: Any
    experiment: str
    place: str
    lock: Path
    added: int = 0
    unchanged: int = 0

    @classmethod
    def connect(cls, root: Path, patience: Patience) -> Store:
        """Open MLFLOW_TRACKING_URI, or mlflow.db at the project root, and its experiment."""
        client_of = import_client()
        home = Path(os.environ.get("DVC_ROOT") or root).resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI") or database_uri(home / "mlflow.db")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "nemo"
        database = _database_of(uri)
        lock = Path(f"{database or home / 'mlflow.db'}.lock")
        new = database is not None and not database.exists()
        with _no_new_folders(uri):
            with patience.making() if new else nullcontext(), locked(lock, say=False):
                if database is not None and not database.exists():
                    _create_database(client_of, database)
            client = Client(client_of(tracking_uri=uri), patience.answered)
            with locked(lock, say=False):
                found = client.get_experiment_by_name(name)
                if found is None:
                    files = (home / "mlartifacts").as_uri() if database else None
                    try:
                        experiment = client.create_experiment(name, files)
                    except Exception:  # a process on another machine may have been a little faster
                        found = client.get_experiment_by_name(name)
                        if found is None:
                            raise
        experiment = found.experiment_id if found else experiment
        return cls(client, str(experiment), str(database or uri), lock)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One writer at a time, so that two that look for a run do not both create it."""
        with locked(self.lock, say=False):
            yield

    def runs(self, tag: str, value: str) -> list[Any]:
        query = f"tags.`{tag}` = '{value}'"
        return list(self.client.search_runs([self.experiment], query, max_results=1000))

    def reopen_or_create(self, key: str, record: Record) -> str:
        """The open run of an interrupted training with the same key, or a new one."""
        for run in self.runs(KEY, key):
            if RESULTS not in run.data.tags:
                self.client.update_run(run.info.run_id, status="RUNNING")
                return str(run.info.run_id)
        run_id = self._create(key, record)
        self.log(run_id, [], record.params)
        return run_id

    def put(self, key: str, record: Record, runs: list[Any]) -> str:
        """Make one run say what `record` says, and return its id.

        Other results among `runs`, which are those of the same key, stay with the role `former`. A
        run that training left open is completed where its curves are those of the record, and
        gives way to a new one otherwise.
        """
        results = digest(record.points)
        finished = [run for run in runs if RESULTS in run.data.tags]
        still_open = [run for run in runs if RESULTS not in run.data.tags]
        same = [run for run in finished if run.data.tags[RESULTS] == results]
        if same:
            run_id = str(same[0].info.run_id)
            if same[0].data.tags[ROLE] != record.tags[ROLE]:
                self.client.set_tag(run_id, ROLE, record.tags[ROLE])
            self.unchanged += 1
        else:
            run_id = self._complete(key, record, results, still_open)
            self.added += 1
        for run in finished:
            if run not in same and run.data.tags[ROLE] != FORMER:
                self._set_aside(run.info.run_id)
        for run in (*same[1:], *still_open):
            if run.info.run_id != run_id:
                self.client.delete_run(run.info.run_id)
        return run_id

    def show(self, views: dict[str, str]) -> None:
        """Keep views of the UI, as tags of the experiment."""
        known = self.client.get_experiment(self.experiment).tags
        for tag, value in views.items():
            if known.get(tag) != value:
                self.client.set_experiment_tag(self.experiment, tag, value)

    def _set_aside(self, run_id: str) -> None:
        """Give a run and those of its modules the role `former`."""
        modules = self.runs("mlflow.parentRunId", run_id)
        for each in (run_id, *(run.info.run_id for run in modules)):
            self.client.set_tag(each, ROLE, FORMER)

    def _create(self, key: str, record: Record) -> str:
        run = self.client.create_run(self.experiment, tags={KEY: key, **record.tags})
        return str(run.info.run_id)

    def _complete(self, key: str, record: Record, results: str, candidates: list[Any]) -> str:
        run_id, missing, end = "", record.points, None
        for run in candidates:
            found = self._missing(run, record.points)
            if found is not None:
                run_id = str(run.info.run_id)
                missing, end = found
                break
        run_id = run_id or self._create(key, record)
        self.client.set_terminated(run_id, "FINISHED", end)
        # the tag comes with the last points: a run that has it is complete
        self.log(run_id, missing, record.params, {**record.tags, RESULTS: results})
        return run_id

    def _missing(self, run: Any, wanted: list[Point]) -> tuple[list[Point], int | None] | None:
        """The points that an open run lacks, and when training ended (ms); None where it has
        others."""
        logged: dict[tuple[str, int], float] = {}
        end = run.info.end_time or 0
        for name in run.data.metrics:
            for metric in self.client.get_metric_history(run.info.run_id, name):
                if (name, metric.step) in logged:
                    return None  # an epoch logged twice: another training went before
                logged[name, metric.step] = metric.value
                end = max(end, metric.timestamp)
        rest = []
        for name, value, step in wanted:
            known = logged.pop((name, step), None)
            if known is None:
                rest.append((name, value, step))
            elif not math.isclose(known, value, rel_tol=1e-5, abs_tol=1e-6):
                return None
        return None if logged else (rest, end or None)

    def log(
        self,
        run_id: str,
        points: list[Point],
        params: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        """Points in few calls; params with the first of them, tags with the last."""
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        starts = range(0, len(points) or 1, BATCH)
        for start in starts:
            self.client.log_batch(
                run_id,
                [Metric(name, v, now, step) for name, v, step in points[start : start + BATCH]],
                [Param(k, str(v)) for k, v in (params or {}).items() if start == 0],
                [RunTag(k, v) for k, v in (tags or {}).items() if start == starts[-1]],
            )


def import_client() -> Any:
    """MLflow's client class; the import costs seconds, and reads the settings made here."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    for noisy in ("alembic", "mlflow.store"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient


def database_uri(path: Path) -> str:
    """The address of a sqlite file, in a folder of any name.

    Seen from inside the project, its own folder's name is not part of the address, which needs
    fewer quotes.
    """
    plain = path.as_posix()
    return f"sqlite:///{plain if quote(plain) == plain else quote(os.path.relpath(path))}"


@contextmanager
def _no_new_folders(uri: str) -> Iterator[None]:
    """Leave no empty folders: MLflow makes one of each quoted name in a sqlite file's address."""
    quoted = Path(uri.removeprefix("sqlite:///")).parent
    new = [folder for folder in (quoted, *quoted.parents) if not folder.exists()]
    try:
        yield
    finally:
        for folder in new if uri.startswith("sqlite:") else ():
            with suppress(OSError):  # not empty, or never made
                folder.rmdir()


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _database_of(uri: str) -> Path | None:
    """The file of a sqlite store."""
    if not uri.startswith("sqlite:"):
        return None
    from sqlalchemy.engine import make_url  # MLflow brings it

    name = make_url(uri).database
    return Path(name).resolve() if name and name != ":memory:" else None


def _create_database(client_of: Any, database: Path) -> None:
    """Whole or not at all: MLflow cannot open what a process that was killed has half migrated."""
    partial = database.with_name(f"{database.name}.partial")
    for left in database.parent.glob("*.partial*"):
        if left.name.startswith(partial.name):
            left.unlink()
    client_of(tracking_uri=database_uri(partial))
    partial.replace(database)
