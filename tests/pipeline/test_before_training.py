"""Classes that are not there are found by `nemo plan` or `nemo prepare`, before any training."""

import urllib.request
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from sklearn.datasets import load_digits

from nemo.cli.main import cli
from nemo.data.sources import CLASSES, load_source
from tests.small import raw_params


def run(folder, command, **changes):
    (folder / "params.yaml").write_text(yaml.safe_dump(raw_params("resnet18", **changes)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return CliRunner().invoke(cli, command.split())


@pytest.fixture
def no_downloads(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("downloads before it has looked at params")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


LOSS = {"alpha": 3.0, "tau": 0.2, "form": "equation"}
WRONG = [
    ({"subsets": ["7+12"]}, "subset '7+12': '12' is no class; accepted: all, file:PATH"),
    ({"subsets": ["cat+0"]}, "subset 'cat+0': 'cat' is no class"),
    ({"loss": {**LOSS, "cut": {"sizes": [2, 12]}}}, "loss.cut.sizes: 12, where there are 10 clas"),
    (
        {
            "methods": ["standard", "mine"],
            "variants": {"mine": {"method": "nemo", "loss.cut": {"sizes": [11]}}},
        },
        "loss.cut.sizes: 11, where there are 10 classes; accepted: 2 to 10",
    ),
    (
        {"data": {"digits": {"source": "digits", "classes": "1+7+4"}}, "subsets": ["all", "0-3"]},
        "subset '0-3': '0-3' is no range of classes, which go up from 0 to 2; accepted: all,",
    ),
    ({"beside": ["nothere"]}, "beside: 'nothere': no file profiles/nothere.yaml; accepted: names"),
]


@pytest.mark.parametrize(("changes", "line"), WRONG)
def test_the_plan_says_it(tmp_path, changes, line):
    done = run(tmp_path, "plan", **changes)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.output
    assert done.stderr.startswith(f"nemo: {line}")
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize(("changes", "line"), WRONG[:-1])
def test_a_cell_says_it_before_it_trains(tmp_path, changes, line):
    method = changes.get("methods", ["nemo"])[-1]
    done = run(tmp_path, f"run --dataset digits --model resnet18 --method {method}", **changes)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.output
    assert line in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("source", ["cifar10", "svhn"])
def test_no_download_for_classes_that_are_not_there(tmp_path, no_downloads, source):
    changes = {"datasets": ["mine"], "data": {"mine": {"source": source}}, "subsets": ["0-10"]}
    for command in ("plan", "prepare --dataset mine"):
        done = run(tmp_path, command, **changes)
        assert done.stderr.startswith("nemo: subset '0-10': '0-10' is no range of classes"), source


def test_sizes_that_no_one_set_fit_any_data(tmp_path):
    loss = {**LOSS, "cut": {"weight": 1.0}}
    changes = {"data": {"digits": {"source": "folder:three"}}, "loss": loss, "subsets": ["all"]}
    assert run(tmp_path, "plan", **changes).exit_code == 0


def test_sizes_are_looked_at_again_where_images_were_prepared_before(tmp_path):
    """A folder's classes are not known to the plan; the training that draws them says it."""
    assert run(tmp_path, "prepare --dataset digits").exit_code == 0
    changes = {
        "data": {"digits": {"source": "folder:gone"}},
        "loss": {**LOSS, "cut": {"sizes": [12]}},
    }
    done = run(tmp_path, "train --dataset digits --model resnet18 --method nemo", **changes)
    assert (
        done.stderr == "nemo: loss.cut.sizes: 12, where there are 10 classes; accepted: 2 to 10\n"
    )
    assert not (tmp_path / "runs").exists()


def test_the_known_classes_are_those_of_the_sources():
    digits = load_source("digits", None, Path())
    assert digits.classes == CLASSES["digits"]
    assert CLASSES["digits"] == [str(name) for name in load_digits().target_names]
    assert len(CLASSES["cifar10"]) == 10
    assert sorted(CLASSES["cifar10"]) == CLASSES["cifar10"]  # as CIFAR-10 orders its own
