"""docs/extending.md is true: its examples are those of a file that a whole pipeline runs with."""

import copy
import csv
import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from nemo.cli.main import cli
from nemo.results import read_result
from tests.test_config import DEFAULT

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "tests/example_plugin.py"
GUIDE = (ROOT / "docs/extending.md").read_text()
METHODS = ("standard", "sparse", "sparse-strong")


pytestmark = pytest.mark.usefixtures("nothing_stays_registered")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.S)


def test_the_guides_examples_are_those_that_run_here():
    examples = PLUGIN.read_text()
    assert len(blocks("python")) == len(re.findall(r"^# --- ", examples, re.M))
    for block in blocks("python"):
        assert block in examples


def guided():
    """The default params with all that the guide changes of them, on less work."""
    params = copy.deepcopy(DEFAULT)
    for block in blocks("yaml"):
        for key, value in yaml.safe_load(block).items():
            merged = isinstance(value, dict) and isinstance(params.get(key), dict)
            params[key] = {**params[key], **value} if merged else value
    params["plugins"] = [str(PLUGIN)]
    params["masks"].pop("threshold")
    params["models"] = ["small_cnn"]
    params["subsets"] = ["0+1"]
    params["train"]["epochs"] = params["finetune"]["epochs"] = 2
    return params


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Every stage, by the commands that DVC calls, of a model, methods and masks of a plugin."""
    root = tmp_path_factory.mktemp("own")
    (root / "params.yaml").write_text(yaml.safe_dump(guided()))
    patch = pytest.MonkeyPatch()
    patch.chdir(root)

    def call(*arguments):
        done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output

    call("plan")
    call("prepare", "--dataset", "digits")
    for method in METHODS:
        cell = ("--dataset", "digits", "--model", "small_cnn", "--method", method)
        call("train", *cell)
        if method != "standard":
            call("masks", *cell)
            call("decompose", *cell, "--subset", "0+1")
            call("finetune", *cell, "--subset", "0+1")
        if method == "sparse":
            call("alternatives", *cell)
        call("evaluate", *cell)
    call("report")
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    call("publish")
    patch.undo()
    return root


def result(root, method):
    return read_result(root / f"results/quick/digits/small_cnn/{method}-0.json")


def table(root, name):
    return (root / f"reports/quick/{name}.md").read_text()


def test_the_guides_params_name_them_all():
    params = guided()
    assert params["methods"] == list(METHODS)
    assert params["masks"]["selector"] == "top"
    assert "small_cnn" in params["architecture"]


def test_a_loss_of_ones_own_is_trained_and_its_variant_too(project):
    weak, strong = result(project, "sparse"), result(project, "sparse-strong")
    assert weak.base == strong.base == "sparse"
    assert weak.params["sparse.weight"] < strong.params["sparse.weight"]
    assert weak.history[-1]["mask_mean"] > strong.history[-1]["mask_mean"]
    assert "loss.tau" not in weak.params


def test_a_selector_of_ones_own_chooses_the_masks(project):
    found = result(project, "sparse")
    assert found.params["masks.share"] == guided()["masks"]["share"]
    assert found.metrics["nrr"] == pytest.approx(found.params["masks.share"], abs=0.02)


def test_a_model_of_ones_own_is_cut(project):
    standard, modular = result(project, "standard"), result(project, "sparse")
    (module,) = modular.modules
    assert module.metrics["parameters"] < standard.metrics["parameters"]
    assert module.metrics["certificate"] < 1e-9


def test_a_rule_of_ones_own_lets_its_op_be_cut(project):
    for method in METHODS[1:]:
        (module,) = result(project, method).modules
        assert module.metrics["blocked"] == 0


def test_an_alternative_of_ones_own_is_compared(project):
    rows = {row["alternative"]: row for row in result(project, "sparse").extras["alternatives"]}
    assert set(rows) == {"random", "pixels"}
    assert rows["pixels"]["parameters"] == 2 * (3 * 16 * 16 + 1)
    assert "pixels" in table(project, "alternatives")


def test_tables_show_the_methods_by_their_names_and_a_metric_of_ones_own(project):
    for method in METHODS:
        assert method in table(project, "T1-models")
    assert "sparse-strong" in table(project, "T2-modules")
    assert "Cohesion - coupling" in table(project, "T1-models")
    with (project / "reports/quick/T1-models.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows["standard"]["separation"] == ""
    found = result(project, "sparse").metrics
    assert float(rows["sparse"]["separation"]) == pytest.approx(
        found["cohesion"] - found["coupling"], abs=1e-6
    )


def test_mlflow_has_them_all(project):
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.role = 'cell'")
    assert {run.data.tags["method"] for run in runs} == set(METHODS)
    strong = next(run for run in runs if run.data.tags["method"] == "sparse-strong")
    assert strong.data.params["sparse.weight"] == "2.0"
    assert {"accuracy", "nrr", "mask_mean", "separation"} <= set(strong.data.metrics)
    modules = client.search_runs(experiments, "tags.role = 'module'")
    assert {run.data.tags["method"] for run in modules} == set(METHODS[1:])


def test_the_plan_knows_that_the_file_decides(project):
    for method in METHODS:
        recipe = json.loads((project / f"plan/digits/small_cnn/{method}/train.json").read_text())
        assert recipe["method"] == ("standard" if method == "standard" else "sparse")


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("sparse", {"weight": -1}, "sparse.weight"),
        ("methods", ["standard", "spares"], "accepted: .*sparse"),
        ("masks", {"selector": "tops"}, "accepted: frequency, taylor, activation, top"),
        ("models", ["small_cn"], "accepted: .*small_cnn"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, key, value, line):
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump({**guided(), key: value}))
    done = CliRunner().invoke(cli, ["plan", "--params", str(file), "--out", str(tmp_path / "plan")])
    assert done.exit_code == 1
    assert re.search(line, done.output), done.output
    assert len(done.output.splitlines()) == 1
