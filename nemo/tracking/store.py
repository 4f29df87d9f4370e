"""The MLflow store: opened with patience limits, and written one run at a time."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from nemo.files import write_json
from nemo.report.results import History
from nemo.tracking.records import Record, digest

T = TypeVar("T")
Point = tuple[str, float, int]  # name, value, step
DEFAULTS = {  # unless the user set them; without the first two a dead server hangs for minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_MODEL_CATALOG_URI": "",
}
KEY, RESULTS, SUPERSEDED = "nemo.key", "nemo.results", "nemo.superseded"
BATCH = 800  # points in one call; MLflow takes 1,000 metrics, params and tags together


class TrackingError(ValueError):
    """The tracking store cannot be used; the message says why."""


@dataclass
class Store:
    """One experiment of an MLflow store."""

    client: Any
    experiment: str
    uri: str
    added: int = 0
    unchanged: int = 0

    @classmethod
    def connect(cls, root: Path) -> Store:
        """Open MLFLOW_TRACKING_URI, or mlflow.db at the project root, and its experiment."""
        client_of = import_client()
        home = Path(os.environ.get("DVC_ROOT", root)).resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.as_posix()}/mlflow.db"
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "nemo"
        database = _database_of(uri)
        with _one_at_a_time(database):
            if database is not None and not database.exists():
                _create_database(client_of, database)
            client = client_of(tracking_uri=uri)
            found = client.get_experiment_by_name(name)
            if found is None:
                place = (home / "mlartifacts").as_uri() if database else None
                try:
                    return cls(client, client.create_experiment(name, place), uri)
                except Exception:  # on a server, another stage may have been a little faster
                    found = client.get_experiment_by_name(name)
                    if found is None:
                        raise
        return cls(client, found.experiment_id, uri)

    def _runs(self, key: str) -> list[Any]:
        query = f"tags.`{KEY}` = '{key}'"
        return list(self.client.search_runs([self.experiment], query, max_results=100))

    def reopen_or_create(self, record: Record) -> str:
        """The open run of an interrupted training with the same key, or a new one."""
        for run in self._runs(record.key):
            if RESULTS not in run.data.tags:
                self.client.update_run(run.info.run_id, status="RUNNING")
                return str(run.info.run_id)
        run_id = self._create(record)
        _log(self.client, run_id, [], record.params, {})
        return run_id

    def _create(self, record: Record) -> str:
        tags = {KEY: record.key, **record.tags}
        return str(self.client.create_run(self.experiment, tags=tags).info.run_id)

    def put(self, record: Record) -> str:
        """Make the run of `record` say what `record` says; return its id.

        Other results of the same key stay, tagged as superseded. A run that training left open is
        completed where its curves are those of the files, and gives way to a new one otherwise.
        """
        results = digest([record.content, record.metrics, record.curves])
        runs = patiently(lambda: self._runs(record.key))
        still_open = [run for run in runs if RESULTS not in run.data.tags]
        same = [run for run in runs if run.data.tags.get(RESULTS) == results]
        if same:
            self.unchanged += 1
            run_id = str(same[0].info.run_id)
        else:
            run_id = self._complete(record, results, still_open)
            for run in runs:
                if run not in still_open:
                    self._supersede(run.info.run_id)
        for run in still_open:
            if run.info.run_id != run_id:
                self.client.delete_run(run.info.run_id)
        return run_id

    def _supersede(self, run_id: str) -> None:
        """Tag a run and the runs of its modules."""
        query = f"tags.`mlflow.parentRunId` = '{run_id}'"
        modules = self.client.search_runs([self.experiment], query, max_results=1000)
        for run in (run_id, *(module.info.run_id for module in modules)):
            self.client.set_tag(run, SUPERSEDED, "true")

    def _complete(self, record: Record, results: str, candidates: list[Any]) -> str:
        final = [(name, value, 0) for name, value in record.metrics.items()]
        run_id, missing = "", points(record.curves) + final
        for run in candidates:
            rest = self._missing(run.info.run_id, missing)
            if rest is not None:
                run_id, missing = str(run.info.run_id), rest
                break
        run_id = run_id or patiently(lambda: self._create(record))
        self._log_files(run_id, record)
        patiently(lambda: _log(self.client, run_id, [], record.params, {}))
        log_points(self.client, run_id, missing)
        patiently(lambda: self.client.set_terminated(run_id, "FINISHED"))
        tags = {**record.tags, RESULTS: results}  # last: a run with this tag is complete
        patiently(lambda: _log(self.client, run_id, [], {}, tags))
        self.added += 1
        return run_id

    def _missing(self, run_id: str, wanted: list[Point]) -> list[Point] | None:
        """The points that the run lacks; None where it has others."""
        logged: dict[tuple[str, int], float] = {}
        for name in {name for name, _, _ in wanted}:
            for metric in self.client.get_metric_history(run_id, name):
                if (name, metric.step) in logged:
                    return None  # an epoch logged twice: another training went before
                logged[name, metric.step] = metric.value
        rest = []
        for name, value, step in wanted:
            known = logged.pop((name, step), None)
            if known is None:
                rest.append((name, value, step))
            elif not math.isclose(known, value, rel_tol=1e-5, abs_tol=1e-6):
                return None
        return None if logged else rest

    def _log_files(self, run_id: str, record: Record) -> None:
        for file in record.files:
            self.client.log_artifact(run_id, str(file), "module")
        with TemporaryDirectory() as folder:
            path = Path(folder) / "evaluation.json"
            write_json(path, record.content)
            self.client.log_artifact(run_id, str(path))


def import_client() -> Any:
    """MLflow's client class; the import costs seconds, and reads the settings made here."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    for noisy in ("alembic", "mlflow.store"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient


def points(rows: History) -> list[Point]:
    """Every finite number of the rows as (name, value, epoch)."""
    return [
        (name, float(value), int(row["epoch"]))
        for row in rows
        for name, value in row.items()
        if name != "epoch" and math.isfinite(value)
    ]


def log_points(client: Any, run_id: str, what: list[Point]) -> None:
    for start in range(0, len(what), BATCH):  # each by itself, so that no point is sent twice
        patiently(partial(_log, client, run_id, what[start : start + BATCH], {}, {}))


def _log(
    client: Any, run_id: str, what: list[Point], params: dict[str, Any], tags: dict[str, str]
) -> None:
    from mlflow.entities import Metric, Param, RunTag

    now = int(time.time() * 1000)
    client.log_batch(
        run_id,
        metrics=[Metric(name, value, now, step) for name, value, step in what],
        params=[Param(name, str(value)) for name, value in params.items()],
        tags=[RunTag(name, value) for name, value in tags.items()],
    )


def patiently(action: Callable[[], T]) -> T:
    """Do it, and again a little later where another process holds the database."""
    for wait in (0.2, 0.5, 1.0, 2.0):
        try:
            return action()
        except Exception as error:  # wrapped in MLflow's own kind; the text tells
            if "locked" not in str(error):
                raise
            time.sleep(wait)
    return action()


def _database_of(uri: str) -> Path | None:
    """The file of a sqlite store."""
    if not uri.startswith("sqlite:"):
        return None
    from sqlalchemy.engine import make_url  # MLflow brings it

    name = make_url(uri).database
    return Path(name) if name and name != ":memory:" else None


def _create_database(client_of: Any, database: Path) -> None:
    """Whole or not at all: MLflow cannot open what a process that was killed has half migrated."""
    partial = database.with_name(f"{database.name}.partial")
    database.parent.mkdir(parents=True, exist_ok=True)
    for left in database.parent.glob(f"{partial.name}*"):
        left.unlink()
    client_of(tracking_uri=f"sqlite:///{partial}")
    partial.replace(database)


@contextmanager
def _one_at_a_time(database: Path | None) -> Iterator[None]:
    """Two processes that create the same sqlite file at once would break it."""
    if database is None:
        yield
        return
    try:
        import fcntl
    except ImportError:  # Windows: nothing to lock with, and stages run one after the other
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f"{database.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
