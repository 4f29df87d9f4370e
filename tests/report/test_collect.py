"""Which files of results a report reads, which it leaves out, and which it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from nemo.cells import Cell
from nemo.report.build import write_report
from nemo.report.collect import collect
from nemo.results import MissingResultError, result_file
from tests.report.fake import edit, extras, make_params, make_results, write_json

PARAMS = make_params()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    make_results(root, PARAMS)
    return root


def path_of(root: Path, model: str, method: str, seed: int = 0) -> Path:
    return result_file(root, "fake", Cell("tiny", model, method, seed))


def test_files_that_params_do_not_list_stay_out(root: Path, tmp_path: Path) -> None:
    fewer = make_params(models=["vit_small"], methods=["standard", "nemo"], subsets=["all"])
    left_out = write_report(fewer, root, tmp_path / "fewer")
    frame = pd.read_csv(tmp_path / "fewer" / "T1-models.csv")
    assert set(frame["model"]) == {"vit_small"}
    assert set(frame["method"]) == {"standard", "nemo"}
    assert set(pd.read_csv(tmp_path / "fewer" / "T2-modules.csv")["subset"]) == {"all"}
    assert len(left_out) == 6 + 2
    assert "left out: results/fake/tiny/resnet18/mwt-0.json: models do not list" in left_out[0]


def test_a_seed_that_params_do_not_list_is_shown(root: Path) -> None:
    results = collect(make_params(seeds=[1]), root)
    assert [c.cell.seed for c in results.of("tiny", "resnet18")] == [0, 1] * 3
    assert results.left_out == []


@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (lambda path: path.write_text("epoch\n{"), "is not JSON"),
        (lambda path: path.write_text("{}"), "holds no results of format 1"),
        (lambda path: path.write_text('{"format": 1}'), "is damaged"),
        (lambda path: edit(path, "params", **{"loss.tau": 0.5}),
         "made with loss.tau 0.5, and params have 0.2; `dvc repro` makes it anew"),
        (lambda path: edit(path, "data", sha256="0ther"), "computed on images of sha256 0ther"),
        (lambda path: edit(path, "cell", seed=3), "is the file of tiny/vit_small/nemo-3"),
    ],
)  # fmt: skip
def test_a_broken_file_is_one_clear_line(
    tmp_path: Path, break_it: Callable[[Path], Any], text: str
) -> None:
    make_results(tmp_path, PARAMS)
    path = path_of(tmp_path, "vit_small", "nemo")
    break_it(path)
    with pytest.raises(MissingResultError) as caught:
        write_report(PARAMS, tmp_path, tmp_path / "report")
    message = str(caught.value)
    assert "vit_small/nemo-" in message
    assert text in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "report").exists()


def test_a_file_of_other_params_that_nothing_lists_is_left_out_and_named(tmp_path: Path) -> None:
    make_results(tmp_path, PARAMS)
    edit(path_of(tmp_path, "vit_small", "nemo", 1), "params", **{"loss.tau": 0.5})
    results = collect(make_params(seeds=[0]), tmp_path)
    (line,) = results.left_out
    assert line.startswith("results/fake/tiny/vit_small/nemo-1.json: made with loss.tau 0.5")


def test_what_is_missing_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    make_results(tmp_path, PARAMS)
    path_of(tmp_path, "vit_small", "nemo").unlink()
    path_of(tmp_path, "resnet18", "standard", 1).unlink()
    path = path_of(tmp_path, "resnet18", "nemo")
    edit(path, "modules", 1, subset="2+3")
    missing = write_report(PARAMS, tmp_path, tmp_path / "report")
    assert missing == [
        "missing: tiny/resnet18/standard-1",
        "missing: tiny/resnet18/nemo-0, classes all",
        "missing: tiny/vit_small/nemo-0",
    ]
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Missing: tiny/vit_small/nemo-0." in page
    frame = pd.read_csv(tmp_path / "report" / "T1-models.csv")
    assert len(frame) == 10
    with pytest.raises(MissingResultError, match="results/other: none of the cells"):
        write_report(make_params(profile="other"), tmp_path, tmp_path / "other")


def test_granularity_may_be_of_classes_that_no_module_has(tmp_path: Path) -> None:
    params = make_params(subsets=["0+1"], granularity={"of": ["nemo"], "subsets": ["all"]})
    make_results(tmp_path, params)
    path = path_of(tmp_path, "resnet18", "nemo")
    content = json.loads(path.read_text())
    write_json(path, content | {"granularity": extras(["all"])["granularity"]})
    found = collect(params, tmp_path).of("tiny", "resnet18")
    (nemo,) = (c for c in found if (c.cell.method, c.cell.seed) == ("nemo", 0))
    assert [row["subset"] for row in nemo.extras["granularity"]] == ["all"] * 2
