"""Stores that are gone, silent, slow or locked: seconds, one warning, and nothing lost later."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from nemo.tracking import TrackingError, publish, publish_quietly, training_run
from nemo.tracking.patience import Patience, in_time
from tests.tracking_fake import (
    CELL,
    FIGURES,
    SHA256,
    curve,
    fresh_environment,
    history,
    make_params,
    runs,
    snapshot,
    write_results,
)

mlflow = pytest.importorskip("mlflow")
BOUND = 10.5  # seconds that MLflow may cost a training or a report in all: 10, and a moment to stop


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fresh_environment(monkeypatch)
    caplog.set_level(logging.WARNING, "nemo")


@contextmanager
def gone() -> Iterator[str]:
    yield "http://127.0.0.1:9"


@contextmanager
def silent() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and never answers
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def dribbling() -> Iterator[str]:
    """A server whose answer comes a byte in a second: no time-out of a single read ends that."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_dribble, args=(server,), daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def _dribble(server: socket.socket) -> None:
    with suppress(OSError):
        connection, _ = server.accept()
        for byte in b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20:
            connection.sendall(bytes([byte]))
            time.sleep(1)


@pytest.mark.parametrize("store", [gone, silent, dribbling])
def test_a_store_that_does_not_answer_costs_seconds_and_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, store: Any
) -> None:
    params = make_params("dead")
    write_results(tmp_path, params)
    for what in ("training", "report"):
        caplog.clear()
        with store() as uri:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
            start = time.monotonic()
            if what == "report":
                assert publish_quietly(params, tmp_path) is None
            else:
                with training_run(params, CELL, SHA256, root=tmp_path) as log_epoch:
                    for epoch in range(1, 100):
                        log_epoch(epoch, {"loss": 1.0})
            assert time.monotonic() - start < BOUND
        (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("nemo")]
        assert warning.startswith("MLflow: ")
        assert len(warning.splitlines()) == 1


def test_publishing_by_hand_to_a_server_that_is_gone_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    write_results(tmp_path, make_params("dead"))
    with pytest.raises(TrackingError, match=r"^MLflow: .*$"):
        publish(make_params("dead"), tmp_path)


def test_a_file_store_is_refused_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    write_results(tmp_path, make_params("dead"))
    assert publish_quietly(make_params("dead"), tmp_path) is None
    assert len([r for r in caplog.records if r.name.startswith("nemo")]) == 1
    assert not (tmp_path / "mlruns").exists()


def test_a_store_is_waited_for_while_it_answers() -> None:
    def answer(patience: Patience, times: int) -> str:
        for _ in range(times):
            time.sleep(0.005)
            patience.answered()
        time.sleep(0.0 if times > 50 else 5)
        return "complete"

    assert in_time(lambda patience: answer(patience, 100), Patience(0.4)) == "complete"
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="too slow"):
        in_time(lambda patience: answer(patience, 10), Patience(0.4))
    assert time.monotonic() - start < 1


ONE_TRAINING = """
import sys, time
from pathlib import Path
from nemo.cells import Cell
from nemo.tracking import live, training_run
from tests.tracking_fake import SHA256, history, make_params

root, profile, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
cell = Cell("digits", "resnet18", "nemo", seed)
start = time.monotonic()
with training_run(make_params(profile), cell, SHA256, root=root) as log_epoch:
    for row in history(cell, 3):
        log_epoch(int(row["epoch"]), row)
print(time.monotonic() - start)
"""


def start_training(root: Path, profile: str, seed: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ONE_TRAINING, str(root), profile, str(seed)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def seconds_and_warnings(training: subprocess.Popen[str]) -> tuple[float, list[str]]:
    """What tracking cost a training that ended well, and what it said."""
    out, said = training.communicate()
    assert training.returncode == 0, said
    return float(out), [line for line in said.splitlines() if line.startswith("MLflow: ")]


def publish_twice(params: Any, root: Path, uri: str) -> list[Any]:
    """The cells in the store once `publish` made it complete; the second time changes nothing."""
    client = mlflow.MlflowClient(uri)
    publish(params, root)
    before = snapshot(client, params.profile)
    assert publish(params, root).added == 0
    assert snapshot(client, params.profile) == before
    found = runs(client, params.profile)
    cells = [(run.data.tags["method"], run.data.tags["seed"]) for run in found]
    assert sorted(cells) == [(m, str(s)) for m in ("nemo", "standard") for s in params.seeds]
    for run in found:
        assert run.info.status == "FINISHED"
        assert set(run.data.metrics) >= FIGURES
        assert [step for step, _ in curve(client, run, "val_accuracy")] == [1, 2, 3]
    return found


def test_two_trainings_at_once_lose_nothing_in_a_new_database_that_is_then_locked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = make_params("two", seeds=[0, 1])
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    write_results(tmp_path, params)
    for training in [start_training(tmp_path, "two", seed) for seed in (0, 1)]:
        seconds, warnings = seconds_and_warnings(training)
        assert seconds < BOUND
        assert len(warnings) <= 1  # making the database may take longer than training waits
    publish_twice(params, tmp_path, uri)

    locked = make_params("locked")
    write_results(tmp_path, locked)
    with closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        seconds, (warning,) = seconds_and_warnings(start_training(tmp_path, "locked", 0))
        start = time.monotonic()
        assert publish_quietly(locked, tmp_path) is None
        waited = time.monotonic() - start
        other.execute("ROLLBACK")
    assert max(seconds, waited) < BOUND
    assert warning.endswith("; training goes on without it")
    (report,) = [r.getMessage() for r in caplog.records if r.name.startswith("nemo")]
    assert report.endswith("`nemo publish` logs the results later")
    publish_twice(locked, tmp_path, uri)


def test_a_database_whose_making_was_killed_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = make_params("killed")
    write_results(tmp_path, params)

    def half_made(tracking_uri: str) -> None:
        Path(tracking_uri.removeprefix("sqlite:///")).write_bytes(b"half a database")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nemo.tracking.store.import_client", lambda: half_made)
        with pytest.raises(KeyboardInterrupt):
            publish(params, tmp_path)
    assert not (tmp_path / "mlflow.db").exists()
    publish_twice(params, tmp_path, f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, str]]:
    """An MLflow server's process, its address, and that of its database."""
    database = f"sqlite:///{tmp_path}/server.db"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"backend-store-uri": database, "port": port, "workers": 1}
    options["default-artifact-root"] = tmp_path / "mlartifacts"
    command = [sys.executable, "-m", "mlflow", "server"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            time.sleep(0.2)
        yield process, f"http://127.0.0.1:{port}", database
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_first_epoch(client: Any, profile: str) -> None:
    for _ in range(300):
        found = runs(client, profile) if client.get_experiment_by_name("nemo") else []
        if found and all("loss" in run.data.metrics for run in found):
            return
        time.sleep(0.2)
    raise AssertionError(f"no epoch of {profile} arrived")


def test_a_server_that_fails_half_way_costs_seconds_and_one_warning(
    tmp_path: Path,
    server: tuple[subprocess.Popen[bytes], str, str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process, uri, database = server
    for profile, blow in (("hangs", signal.SIGSTOP), ("dies", signal.SIGKILL)):
        params, rows = make_params(profile), history(CELL, 3)
        write_results(tmp_path, params)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        caplog.clear()
        entered = time.monotonic()
        with training_run(params, CELL, SHA256, root=tmp_path) as log_epoch:
            seconds = time.monotonic() - entered
            log_epoch(1, rows[0])
            wait_for_first_epoch(mlflow.MlflowClient(uri), profile)
            os.killpg(process.pid, blow)
            resumed = time.monotonic()
            for row in rows[1:]:
                log_epoch(int(row["epoch"]), row)
        assert seconds + time.monotonic() - resumed < BOUND
        (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("nemo")]
        assert "training goes on without it" in warning

        (live,) = runs(mlflow.MlflowClient(database), profile)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", database)  # as if the server were there again
        found = publish_twice(params, tmp_path, database)
        assert live.info.run_id in {run.info.run_id for run in found}
        if blow == signal.SIGSTOP:
            os.killpg(process.pid, signal.SIGCONT)
