"""MLflow runs through its own client: training opens them, finished results complete them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo.cells import Cell
from nemo.results import MissingResultError
from nemo.tracking import TrackingError, publish, publish_quietly, training_run
from nemo.tracking import store as store_module
from tests.tracking_fake import (
    CELL,
    FIGURES,
    SHA256,
    curve,
    edit,
    fresh_environment,
    history,
    make_params,
    runs,
    snapshot,
    write_result,
    write_results,
)

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests, since making one takes seconds; each has its own profile."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, database: str) -> None:
    fresh_environment(monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)


@pytest.fixture
def client(database: str) -> Any:
    return mlflow.MlflowClient(database)


def of_method(client: Any, profile: str, method: str = "nemo") -> Any:
    (run,) = [r for r in runs(client, profile) if r.data.tags["method"] == method]
    return run


def test_publish_logs_cells_and_modules_and_twice_changes_nothing(
    tmp_path: Path, client: Any
) -> None:
    params = make_params("twice")
    write_results(tmp_path, params)
    first = publish(params, tmp_path)
    assert (first.added, first.unchanged, first.skipped) == (4, 0, [])

    nemo, standard = of_method(client, "twice"), of_method(client, "twice", "standard")
    assert nemo.data.metrics["accuracy"] == 0.94
    assert FIGURES | {"nrr", "cohesion", "coupling", "loss_points"} <= set(nemo.data.metrics)
    assert nemo.data.params["loss.alpha"] == "2.0"  # that of the CNNs
    assert nemo.data.params["loss.tau"] == "0.2"
    assert "loss.tau" not in standard.data.params
    assert nemo.data.tags["base"] == "nemo"
    assert nemo.data.tags["mlflow.source.git.commit"] == "0123456789ab"
    assert [step for step, _ in curve(client, nemo, "val_accuracy")] == [1, 2, 3]
    assert nemo.info.end_time - nemo.info.start_time < 60_000

    modules = runs(client, "twice", "module")
    assert {run.data.tags["subset"] for run in modules} == {"0+1", "all"}
    assert {run.data.tags["mlflow.parentRunId"] for run in modules} == {nemo.info.run_id}
    wanted = FIGURES | {"accuracy_step0", "accuracy_standard", "parameters_ratio", "certificate"}
    assert all(wanted <= set(run.data.metrics) for run in modules)

    before = snapshot(client, "twice")
    second = publish(params, tmp_path)
    assert (second.added, second.unchanged) == (0, 4)
    assert snapshot(client, "twice") == before


def test_each_of_three_experiments_is_complete_without_another_command(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tau in (0.2, 0.3, 0.5):
        params = make_params("three", tau)
        write_results(tmp_path, params)  # takes the place of the last experiment's
        monkeypatch.setenv("DVC_EXP_NAME", f"tau-{tau}")
        assert publish_quietly(params, tmp_path) is not None
    cells = [r for r in runs(client, "three") if r.data.tags["method"] == "nemo"]
    assert {r.data.params["loss.tau"]: r.data.tags["dvc.experiment"] for r in cells} == {
        str(tau): f"tau-{tau}" for tau in (0.2, 0.3, 0.5)
    }
    for run in cells:
        nrr = 0.2 + float(run.data.params["loss.tau"]) / 3
        assert run.data.metrics["nrr"] == pytest.approx(nrr, rel=1e-5)
        assert FIGURES | {"cohesion", "coupling"} <= set(run.data.metrics)
    assert len(runs(client, "three")) == 4  # and one standard model
    modules = runs(client, "three", "module")
    assert len(modules) == 6
    assert all(set(run.data.metrics) >= FIGURES for run in modules)
    names = [run.info.run_name[:20] for run in (*cells, *modules)]
    assert len(set(names)) == len(names)


def test_earlier_results_are_set_aside_and_come_back(tmp_path: Path, client: Any) -> None:
    params = make_params("others")
    write_results(tmp_path, params)
    publish(params, tmp_path)
    edit(tmp_path, params, CELL, accuracy=0.5)
    assert publish(params, tmp_path).added == 3  # its modules stand below it
    assert of_method(client, "others").data.metrics["accuracy"] == 0.5
    assert len(runs(client, "others", "former")) == 3
    edit(tmp_path, params, CELL, accuracy=0.94)
    assert publish(params, tmp_path).added == 0
    assert of_method(client, "others").data.metrics["accuracy"] == 0.94
    assert len(runs(client, "others", "module")) == 2


def test_results_of_other_params_are_refused_in_one_line(
    tmp_path: Path, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write_results(tmp_path, make_params("misfit", tau=0.5))
    params = make_params("misfit", tau=0.2)
    with pytest.raises(MissingResultError) as refused:
        publish(params, tmp_path)
    line = str(refused.value)
    assert line.startswith("results/misfit/digits/resnet18/nemo-0.json: made with loss.tau 0.5")
    assert len(line.splitlines()) == 1
    assert publish_quietly(params, tmp_path) is None
    assert [r.getMessage() for r in caplog.records if r.getMessage().startswith(line)]
    assert runs(client, "misfit") == []


def test_what_is_not_finished_is_skipped_and_named(tmp_path: Path) -> None:
    variants = {"tau-0.1": {"method": "nemo", "loss.tau": 0.1}}
    params = make_params("part", models=["resnet18", "vit_small"], variants=variants)
    with pytest.raises(MissingResultError, match="results/part: none"):
        publish(params, tmp_path)
    write_results(tmp_path, make_params("part"))
    write_result(tmp_path, params, Cell("digits", "resnet18", "tau-0.1", 0))  # no stage's, but here
    summary = publish(params, tmp_path)
    assert summary.added == 7
    assert summary.skipped == [
        f"digits/vit_small/{method}-0 has no results" for method in ("standard", "nemo")
    ]


def interrupted_training(params: Any, root: Path) -> None:
    with training_run(params, CELL, SHA256, root=root) as log_epoch:
        log_epoch(1, history(CELL, 3)[0])
        raise RuntimeError("power cut")


def test_publish_completes_the_run_that_training_logged(tmp_path: Path, client: Any) -> None:
    params = make_params("live")
    with pytest.raises(RuntimeError, match="power cut"):
        interrupted_training(params, tmp_path)
    (run,) = runs(client, "live")
    assert run.info.status == "FAILED"
    with training_run(params, CELL, SHA256, root=tmp_path) as log_epoch:  # resumed, killed before 3
        log_epoch(2, history(CELL, 3)[1])
    (ended,) = runs(client, "live")
    write_results(tmp_path, params)
    publish(params, tmp_path)

    again = of_method(client, "live")
    assert again.info.run_id == run.info.run_id
    assert again.info.end_time == ended.info.end_time  # when training ended, not publishing
    assert dict(curve(client, again, "loss")) == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3})
    assert again.data.metrics["accuracy"] == 0.94


def test_a_live_run_with_other_curves_gives_way(tmp_path: Path, client: Any) -> None:
    params = make_params("stale")
    with training_run(params, CELL, SHA256, root=tmp_path) as log_epoch:
        log_epoch(1, {"loss": 99.0, "val_accuracy": float("nan")})
    (stale,) = runs(client, "stale")
    write_results(tmp_path, params)
    publish(params, tmp_path)
    run = of_method(client, "stale")
    assert run.info.run_id != stale.info.run_id
    assert curve(client, run, "loss")[0] == pytest.approx((1, 1.0))


def test_epochs_are_written_at_most_every_two_seconds(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    log: Callable[..., None] = store_module.Store.log
    monkeypatch.setattr(
        store_module.Store, "log", lambda *given: (calls.append(len(given[2])), log(*given))
    )
    with training_run(make_params("flush"), CELL, SHA256, root=tmp_path) as log_epoch:
        for epoch in range(1, 21):
            log_epoch(epoch, {"loss": 1 / epoch})
    assert len(calls) < 20
    (run,) = runs(client, "flush")
    assert len(curve(client, run, "loss")) == 20


def test_the_ui_has_ready_views(tmp_path: Path, client: Any) -> None:
    params = make_params("views")
    write_results(tmp_path, params)
    summary = publish(params, tmp_path)
    experiment = client.get_experiment_by_name("nemo")
    for name, address in summary.addresses.items():
        key = address.split("viewStateShareKey=")[1].split("&")[0]
        view = json.loads(experiment.tags[f"mlflow.sharedViewState.{key}"])
        assert f"/#/experiments/{experiment.experiment_id}/runs?" in address
        assert "metrics.`accuracy`" in view["selectedColumns"], name
    whole = view["compareRunCharts"][0]
    assert whole["selectedParams"] == ["loss.alpha", "loss.tau"]
    assert whole["selectedMetrics"] == ["accuracy", "nrr", "coupling"]


PUBLISH = """
import sys
from pathlib import Path
from nemo.tracking import publish
from tests.tracking_fake import make_params
print(publish(make_params("both", seeds=[0, int(sys.argv[2])]), Path(sys.argv[1])))
"""


def test_publishers_at_once_lose_and_double_nothing_in_a_folder_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    root = tmp_path / "data?v2 my%20project#1"
    write_results(root, make_params("both", seeds=[0, 1, 2]))
    command = [sys.executable, "-c", PUBLISH, str(root)]
    started = [
        subprocess.Popen([*command, seed], cwd=root, stdout=subprocess.PIPE) for seed in ("1", "2")
    ]
    said = [process.communicate()[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert all(line.startswith(f"{root}/mlflow.db: ") for line in said)
    assert {path.name for path in tmp_path.iterdir()} == {root.name}
    monkeypatch.chdir(root)
    client = mlflow.MlflowClient("sqlite:///mlflow.db")
    cells = sorted((r.data.tags["method"], r.data.tags["seed"]) for r in runs(client, "both"))
    assert cells == [(m, str(s)) for m in ("nemo", "standard") for s in (0, 1, 2)]
    assert len(runs(client, "both", "module")) == 6


@pytest.mark.parametrize("inside", [True, False])
def test_no_folder_is_left_beside_one_of_an_odd_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    root, elsewhere = tmp_path / "my%20data?v2" / "project", tmp_path / "elsewhere"
    root.mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(root if inside else elsewhere)
    with training_run(make_params("odd"), CELL, SHA256, root=root) as log_epoch:
        log_epoch(1, {"loss": 1.0})
    assert {path.name for path in tmp_path.iterdir()} == {"my%20data?v2", "elsewhere"}
    assert not list(elsewhere.iterdir())
    assert (root / "mlflow.db").is_file()


def test_without_mlflow_a_report_says_so_once_and_publish_what_to_install(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    params = make_params("without")
    write_results(tmp_path, params)
    caplog.set_level(logging.WARNING, "nemo")
    with training_run(params, CELL, SHA256, root=tmp_path) as log_epoch:
        log_epoch(1, {"loss": 1.0})
    assert publish_quietly(params, tmp_path) is None
    training, report = [r.getMessage() for r in caplog.records]
    assert training == "MLflow is not installed: curves are in history.csv only"
    assert report.startswith("MLflow is not installed: pip install")
    with pytest.raises(TrackingError, match="pip install"):
        publish(params, tmp_path)


def test_off_touches_nothing(tmp_path: Path) -> None:
    with training_run(make_params("off"), CELL, SHA256, enabled=False, root=tmp_path) as log_epoch:
        log_epoch(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_importing_tracking_imports_neither_mlflow_nor_torch() -> None:
    code = "import sys, nemo.tracking; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], check=False, env=environment)
    assert done.returncode == 0
