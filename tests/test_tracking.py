"""MLflow runs against a database of their own, and against servers that do not answer."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemo.layout import Cell, Layout
from nemo.report.results import MissingResultError, read_history
from nemo.tracking import TrackingError, publish, training_run
from nemo.tracking import live as live_module
from tests.report.fake import edit, make_params, make_results

mlflow = pytest.importorskip("mlflow")
CELL = Cell("tiny", "resnet18", "nemo", 0)
SETTINGS = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
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


def rows_of(root: Path) -> list[dict[str, float]]:
    path = Layout(root).train(CELL) / "history.csv"
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
    assert seconds < 10
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
    assert seconds < 20
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
import sys
from pathlib import Path
from nemo.layout import Cell
from nemo.tracking import training_run
from tests.report.fake import make_params

cell = Cell("tiny", "resnet18", "nemo", int(sys.argv[2]))
with training_run(make_params(profile="home"), cell, root=Path(sys.argv[1])) as log_epoch:
    for epoch in range(1, 30):
        log_epoch(epoch, {"loss": 1 / epoch})
"""


def test_two_trainings_share_a_new_database_at_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("DVC_EXP_NAME", "bold-otter")
    trainings = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_TRAINING, str(tmp_path), str(seed)],
            cwd=Path(__file__).parents[1],
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in (0, 1)
    ]
    warnings = [training.communicate()[1] for training in trainings]
    assert "training goes on" not in "".join(warnings)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = runs(client, "home")
    assert [run.data.tags["dvc.experiment"] for run in found] == ["bold-otter"] * 2
    assert [len(curve(client, run, "loss")) for run in found] == [29, 29]


def test_importing_tracking_imports_no_mlflow() -> None:
    code = "import sys, nemo.tracking, nemo.report; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
