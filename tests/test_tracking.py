"""MLflow runs against a database of their own, and against servers that do not answer."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from nemo.cells import Cell, Layout
from nemo.report.results import MissingResultError, read_history
from nemo.tracking import TrackingError, publish, training_run
from nemo.tracking import live as live_module
from tests.report.fake import edit, make_params, make_results

mlflow = pytest.importorskip("mlflow")
CELL = Cell("tiny", "resnet18", "nemo", 0)
SETTINGS = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
BOUND = 10.0  # seconds that MLflow may cost a training in all
OTHERS = ("DVC_ROOT", "DVC_EXP_NAME", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests, since making one takes seconds; each has its own profile."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, database: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    for name in (*SETTINGS, *OTHERS):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone
        monkeypatch.delenv(name)


@pytest.fixture
def client(database: str) -> Any:
    return mlflow.MlflowClient(database)


def params_of(profile: str, **changes: Any) -> Any:
    small = {"models": ["resnet18"], "methods": ["standard", "nemo"], "seeds": [0]}
    return make_params(**(small | {"profile": profile} | changes))


def runs(client: Any, profile: str, role: str = "cell") -> list[Any]:
    experiment = client.get_experiment_by_name("nemo").experiment_id
    return list(
        client.search_runs([experiment], f"tags.profile = '{profile}' and tags.role = '{role}'")
    )


def curve(client: Any, run: Any, name: str) -> list[tuple[int, float]]:
    found = client.get_metric_history(run.info.run_id, name)
    return sorted((metric.step, metric.value) for metric in found)


def snapshot(client: Any, profile: str) -> list[Any]:
    every = runs(client, profile) + runs(client, profile, "module")
    return sorted(
        (
            r.info.run_id,
            r.info.end_time,
            sorted(r.data.tags.items()),
            sorted(r.data.metrics.items()),
        )
        for r in every
    )


def test_publish_logs_cells_and_modules_and_twice_changes_nothing(
    tmp_path: Path, client: Any
) -> None:
    params = params_of("twice")
    make_results(tmp_path, params)
    first = publish(params, tmp_path)
    assert (first.added, first.unchanged, first.skipped) == (4, 0, [])

    cells = {run.data.tags["method"]: run for run in runs(client, "twice")}
    nemo = cells["nemo"]
    assert set(cells) == {"standard", "nemo"}
    assert nemo.data.metrics["accuracy"] == 0.94
    assert {"nrr", "cohesion", "coupling", "parameters", "flops"} <= set(nemo.data.metrics)
    assert nemo.data.params["loss.alpha"] == "2.0"  # that of the CNNs
    assert nemo.data.params["loss.tau"] == "0.2"
    assert "loss.tau" not in cells["standard"].data.params
    assert [step for step, _ in curve(client, nemo, "val_accuracy")] == [1, 2, 3]

    modules = runs(client, "twice", "module")
    assert {run.data.tags["subset"] for run in modules} == {"0+1", "all"}
    assert {run.data.tags["mlflow.parentRunId"] for run in modules} == {nemo.info.run_id}
    assert {run.data.metrics["accuracy_step0"] for run in modules} == {0.5}
    files = {f.path for f in client.list_artifacts(modules[0].info.run_id, "module")}
    assert files == {
        f"module/{name}" for name in ("module.json", "module.safetensors", "metrics.json")
    }

    before = snapshot(client, "twice")
    second = publish(params, tmp_path)
    assert (second.added, second.unchanged) == (0, 4)
    assert snapshot(client, "twice") == before


def test_other_params_and_other_results_add_runs(tmp_path: Path, client: Any) -> None:
    params = params_of("others")
    make_results(tmp_path, params)
    publish(params, tmp_path)
    loss = {"alpha": 1.0, "tau": 0.5, "form": "equation"}
    assert publish(params_of("others", loss=loss), tmp_path).added == 3  # nemo and its modules
    taus = sorted(r.data.params.get("loss.tau", "") for r in runs(client, "others"))
    assert taus == ["", "0.2", "0.5"]

    edit(Layout(tmp_path).evaluation("tiny", "resnet18"), "cells", 0, accuracy=0.5)
    assert publish(params, tmp_path).added == 1
    standard = [r for r in runs(client, "others") if r.data.tags["method"] == "standard"]
    assert {r.data.metrics["accuracy"]: "nemo.superseded" in r.data.tags for r in standard} == {
        0.95: True,
        0.5: False,
    }


def rows_of(root: Path, cell: Cell = CELL) -> list[dict[str, float]]:
    path = Layout(root).train(cell) / "history.csv"
    return read_history(path, root, "train")


def interrupted_training(params: Any, root: Path) -> None:
    with training_run(params, CELL, root=root) as log_epoch:
        log_epoch(1, rows_of(root)[0])
        raise RuntimeError("power cut")


def test_publish_completes_the_run_that_training_logged(tmp_path: Path, client: Any) -> None:
    params = params_of("live")
    make_results(tmp_path, params)
    with pytest.raises(RuntimeError, match="power cut"):
        interrupted_training(params, tmp_path)
    (run,) = runs(client, "live")
    assert run.info.status == "FAILED"
    with training_run(params, CELL, root=tmp_path) as log_epoch:  # resumed, and killed before 3
        log_epoch(2, rows_of(tmp_path)[1])
    publish(params, tmp_path)

    (again,) = [r for r in runs(client, "live") if r.data.tags["method"] == "nemo"]
    assert again.info.run_id == run.info.run_id
    assert dict(curve(client, again, "loss")) == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3})
    assert len(curve(client, again, "loss")) == 3


def test_a_live_run_with_other_curves_gives_way(tmp_path: Path, client: Any) -> None:
    params = params_of("stale")
    make_results(tmp_path, params)
    with training_run(params, CELL, root=tmp_path) as log_epoch:
        log_epoch(1, {"loss": 99.0, "val_accuracy": float("nan")})
    (stale,) = runs(client, "stale")
    publish(params, tmp_path)
    (run,) = [r for r in runs(client, "stale") if r.data.tags["method"] == "nemo"]
    assert run.info.run_id != stale.info.run_id
    assert curve(client, run, "loss")[0] == pytest.approx((1, 1.0))


def test_epochs_are_written_at_most_every_two_seconds(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    log = live_module.log_points
    monkeypatch.setattr(
        live_module, "log_points", lambda c, r, what: (calls.append(len(what)), log(c, r, what))
    )
    with training_run(params_of("flush"), CELL, root=tmp_path) as log_epoch:
        for epoch in range(1, 21):
            log_epoch(epoch, {"loss": 1 / epoch})
    assert len(calls) < 20
    (run,) = runs(client, "flush")
    assert len(curve(client, run, "loss")) == 20


def test_what_is_not_finished_is_skipped_and_named(tmp_path: Path, client: Any) -> None:
    params = params_of("part", models=["resnet18", "vit_small"])
    with pytest.raises(MissingResultError, match=r"evaluation/tiny/resnet18\.json is missing"):
        publish(params, tmp_path)
    make_results(tmp_path, params_of("part"))
    summary = publish(params, tmp_path)
    assert summary.added == 4
    assert "skipped: evaluation/tiny/vit_small.json is missing" in str(summary)


def log_to(
    uri: str, root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> tuple[float, list[str]]:
    """Seconds that tracking to `uri` costs a training, and the warnings it gives."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    caplog.set_level(logging.WARNING, "nemo")
    start = time.monotonic()
    with training_run(params_of("dead"), CELL, root=root) as log_epoch:
        for epoch in range(1, 100):
            log_epoch(epoch, {"loss": 1.0})
    seconds = time.monotonic() - start
    return seconds, [r.getMessage() for r in caplog.records if r.name.startswith("nemo")]


def test_a_dead_server_costs_seconds_and_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, warnings = log_to("http://127.0.0.1:9", tmp_path, caplog, monkeypatch)
    assert seconds < BOUND
    assert len(warnings) == 1
    assert "training goes on without it" in warnings[0]
    assert len(warnings[0].splitlines()) == 1
    make_results(tmp_path, params_of("dead"))
    with pytest.raises(TrackingError, match="MLflow: "):
        publish(params_of("dead"), tmp_path)


def test_a_silent_server_costs_seconds_and_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        seconds, warnings = log_to(uri, tmp_path, caplog, monkeypatch)
    assert seconds < BOUND
    assert len(warnings) == 1


def test_a_file_store_is_refused_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, warnings = log_to((tmp_path / "mlruns").as_uri(), tmp_path, caplog, monkeypatch)
    assert len(warnings) == 1
    assert not (tmp_path / "mlruns").exists()


def test_without_mlflow_training_goes_on_and_publish_says_what_to_install(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    _, warnings = log_to("sqlite:///unused.db", tmp_path, caplog, monkeypatch)
    assert warnings == ["MLflow is not installed: curves are in history.csv only"]
    make_results(tmp_path, params_of("dead"))
    with pytest.raises(TrackingError, match="pip install"):
        publish(params_of("dead"), tmp_path)


def test_off_touches_nothing(tmp_path: Path) -> None:
    with training_run(params_of("off"), CELL, enabled=False, root=tmp_path) as log_epoch:
        log_epoch(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


ONE_TRAINING = """
import sys, time
from pathlib import Path
from nemo.cells import Cell
from nemo.tracking import live, training_run
from tests.report.fake import make_params
from tests.test_tracking import rows_of

root, profile, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
live.PATIENCE = float(sys.argv[4])
cell = Cell("tiny", "resnet18", "nemo", seed)
start = time.monotonic()
with training_run(make_params(profile=profile), cell, root=root) as log_epoch:
    for row in rows_of(root, cell):
        log_epoch(int(row["epoch"]), row)
print(time.monotonic() - start)
"""


def start_training(root: Path, profile: str, seed: int, patience: float) -> subprocess.Popen[str]:
    arguments = [str(root), profile, str(seed), str(patience)]
    return subprocess.Popen(
        [sys.executable, "-c", ONE_TRAINING, *arguments],
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
        assert {"accuracy", "parameters", "flops"} <= set(run.data.metrics)
        assert [step for step, _ in curve(client, run, "val_accuracy")] == [1, 2, 3]
    return found


def test_two_trainings_share_a_new_database_at_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("DVC_EXP_NAME", "bold-otter")
    make_results(tmp_path, params_of("home", seeds=[0, 1]))
    trainings = [start_training(tmp_path, "home", seed, patience=120) for seed in (0, 1)]
    assert [seconds_and_warnings(training)[1] for training in trainings] == [[], []]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = runs(client, "home")
    assert [run.data.tags["dvc.experiment"] for run in found] == ["bold-otter"] * 2
    assert [len(curve(client, run, "loss")) for run in found] == [3, 3]


def test_four_trainings_at_once_lose_nothing_in_a_new_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    params = params_of("four", seeds=[0, 1, 2, 3])
    make_results(tmp_path, params)
    trainings = [start_training(tmp_path, "four", seed, live_module.PATIENCE) for seed in range(4)]
    for training in trainings:
        seconds, warnings = seconds_and_warnings(training)
        assert seconds < BOUND
        assert len(warnings) <= 1  # making the database may take longer than training waits
    publish_twice(params, tmp_path, f"sqlite:///{tmp_path}/mlflow.db")


def test_a_database_whose_making_was_killed_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    params = params_of("killed")
    make_results(tmp_path, params)

    def half_made(tracking_uri: str) -> None:
        Path(tracking_uri.removeprefix("sqlite:///")).write_bytes(b"half a database")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nemo.tracking.store.import_client", lambda: half_made)
        with pytest.raises(KeyboardInterrupt):
            publish(params, tmp_path)
    assert not (tmp_path / "mlflow.db").exists()
    publish_twice(params, tmp_path, f"sqlite:///{tmp_path}/mlflow.db")


def test_a_database_locked_by_another_writer_costs_seconds_and_one_warning(
    tmp_path: Path, database: str, client: Any
) -> None:
    params = params_of("locked")
    make_results(tmp_path, params)
    other = sqlite3.connect(database.removeprefix("sqlite:///"), isolation_level=None)
    with closing(other):
        other.execute("BEGIN EXCLUSIVE")
        seconds, warnings = seconds_and_warnings(
            start_training(tmp_path, "locked", 0, live_module.PATIENCE)
        )
        other.execute("ROLLBACK")
    assert seconds < BOUND
    (warning,) = warnings  # sqlite may give up first
    assert warning.startswith(
        ("MLflow: the store is too slow", "MLflow: (sqlite3.OperationalError)")
    )
    assert warning.endswith("; training goes on without it")
    publish_twice(params, tmp_path, database)


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


@pytest.mark.parametrize("blow", [signal.SIGSTOP, signal.SIGKILL], ids=["hangs", "dies"])
def test_a_server_that_fails_half_way_costs_seconds_and_one_warning(
    tmp_path: Path,
    server: tuple[subprocess.Popen[bytes], str, str],
    blow: signal.Signals,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process, uri, database = server
    params = params_of("half")
    make_results(tmp_path, params)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    caplog.set_level(logging.WARNING, "nemo")
    entered = time.monotonic()
    with training_run(params, CELL, root=tmp_path) as log_epoch:
        seconds = time.monotonic() - entered
        log_epoch(1, rows_of(tmp_path)[0])
        wait_for_first_epoch(mlflow.MlflowClient(uri), "half")
        os.killpg(process.pid, blow)
        resumed = time.monotonic()
        for row in rows_of(tmp_path)[1:]:
            log_epoch(int(row["epoch"]), row)
    assert seconds + time.monotonic() - resumed < BOUND
    warnings = [r.getMessage() for r in caplog.records if r.name.startswith("nemo")]
    assert len(warnings) == 1
    assert "training goes on without it" in warnings[0]
    with pytest.raises(TrackingError, match="MLflow: "):
        publish(params, tmp_path)

    (live,) = runs(mlflow.MlflowClient(database), "half")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)  # as if the server were there again
    found = publish_twice(params, tmp_path, database)
    assert live.info.run_id in {run.info.run_id for run in found}


def test_importing_tracking_imports_no_mlflow() -> None:
    code = "import sys, nemo.tracking, nemo.report; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
