"""Cells without DVC: the same results as stage by stage, nothing twice, several at once, kills."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from nemo.cells import cells
from nemo.cli.main import cli
from nemo.config import load_params
from nemo.results import read_result, result_file
from tests.bad_input.project import CELL, PARAMS, ROOT, images

ALL = PARAMS | {
    "alternatives": {"of": ["nemo"], "kinds": ["random", "standard-tuned"]},
    "gap": {"of": ["nemo"]},
    "subsets": ["cat+dog"],
}
STAGES = [f"train {CELL} --method standard", f"evaluate {CELL} --method standard", f"train {CELL}"]
STAGES += [f"masks {CELL}", f"decompose {CELL} --subset cat+dog"]
STAGES += [f"finetune {CELL} --subset cat+dog"]
STAGES += [f"alternatives {CELL}", f"gap {CELL}", f"evaluate {CELL}"]
RUN = [sys.executable, "-c", "from nemo.cli import main; main()"]


def make(root: Path) -> Path:
    root.mkdir()
    images("pets", dict.fromkeys(["cat", "dog", "owl", "pig"], 8))(root)
    (root / "params.yaml").write_text(yaml.safe_dump(ALL))
    return root


def call(root: Path, command: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        result = CliRunner().invoke(cli, command.split())
    assert result.exit_code == 0, result.output
    return result.output


def start(root: Path, command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*RUN, *command.split()], cwd=root, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def made(root: Path) -> dict[str, str]:
    """What the stages wrote: images, weights, masks, modules, rows and results; the text of JSON,
    of others a digest: pytest would spend minutes on the difference of two files of weights."""
    files = (p for name in ("data", "runs", "results") for p in (root / name).rglob("*"))
    return {
        str(p.relative_to(root)): p.read_text()
        if p.suffix == ".json"
        else hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if p.is_file()
    }


@pytest.fixture(scope="module")
def by_stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stage after another in a process of its own, which no other test has been in."""
    root = make(tmp_path_factory.mktemp("stages") / "project")
    commands = [command.split() for command in ("prepare --dataset pets", *STAGES)]
    code = "import sys; from nemo.cli.main import cli\nfor c in {}: cli(c, standalone_mode=False)"
    subprocess.run(
        [sys.executable, "-c", code.format(commands)], cwd=root, check=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def by_cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both cells at once, from nothing; the one by NeMo needs the standard model, too."""
    root = make(tmp_path_factory.mktemp("cells") / "project")
    commands = call(root, "cells").splitlines()
    assert commands == [f"nemo run {CELL} --method {m} --seed 0" for m in ("standard", "nemo")]
    running = [start(root, command.removeprefix("nemo ")) for command in commands]
    for process in running:
        said = process.communicate(timeout=200)[0]
        assert process.returncode == 0, said
    return root


def test_cells_at_once_give_the_bytes_of_stage_by_stage(by_stages: Path, by_cells: Path) -> None:
    assert made(by_cells) == made(by_stages)
    left = [path.name for path in (by_cells / ".checkpoints").iterdir()]
    assert all(name.startswith("done-") and name.endswith(".json") for name in left), left


def test_a_variant_where_another_table_names_some_subsets(tmp_path: Path) -> None:
    root = make(tmp_path / "project")
    more = {
        "methods": ["standard", "nemo", "mild"],
        "variants": {"mild": {"method": "nemo", "loss.alpha": 0.1}},
        "subsets": ["cat+dog", "owl+pig"],
        "budgets": {"of": ["nemo"], "kinds": [], "subsets": ["owl+pig"]},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(ALL | more))
    call(root, f"run {CELL} --method mild")
    cell = next(one for one in cells(load_params(root / "params.yaml")) if one.method == "mild")
    found = read_result(result_file(root, ALL["profile"], cell))
    assert sorted(found.subsets) == ["cat+dog", "owl+pig"]


def test_the_commands_are_those_of_all_cells(by_cells: Path) -> None:
    params = load_params(by_cells / "params.yaml")
    every = list(cells(params))
    assert [cell.method for cell in every] == ["standard", "nemo"]
    assert all(result_file(by_cells, "tiny", cell).is_file() for cell in every)
    call(by_cells, "report")
    (by_cells / "mine.yaml").write_text(yaml.safe_dump(ALL))
    *_, last = call(by_cells, "cells --params mine.yaml").splitlines()
    assert last == f"nemo run {CELL} --method nemo --seed 0 --params mine.yaml"


def test_a_second_run_does_nothing(by_cells: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in by_cells.rglob("*") if path.is_file()}
    for method in ("standard", "nemo"):
        said = call(by_cells, f"run {CELL} --method {method}")
        assert said.count("\n") == 1
        assert said.startswith(f"results of pets/resnet18/{method}-0: results/tiny/pets/resnet18/")
    assert {p: p.stat().st_mtime_ns for p in by_cells.rglob("*") if p.is_file()} == times


def test_only_what_a_change_decides_runs_again(by_cells: Path, tmp_path: Path) -> None:
    root = shutil.copytree(by_cells, tmp_path / "project")
    before = made(root)
    tuned = ALL | {"finetune": {**ALL["finetune"], "lr": 0.01}}
    (root / "params.yaml").write_text(yaml.safe_dump(tuned))
    cell, result = "runs/pets/resnet18/nemo-0", "results/tiny/pets/resnet18/nemo-0.json"
    *ran, _ = call(root, f"run {CELL}").splitlines()
    assert ran == [f"{cell}/finetuned/cat+dog", f"{cell}/alternatives", result]
    after = made(root)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert all(name.startswith(tuple(ran)) for name in changed)
    shutil.rmtree(root / f"{cell}/masks")  # and what is no longer there
    assert call(root, f"run {CELL}").splitlines()[:-1] == [f"{cell}/masks"]


def test_budgets_are_measured_where_params_ask_and_are_part_of_the_results(
    by_cells: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(by_cells, tmp_path / "project")
    asked = {"of": ["nemo"], "kinds": ["random"], "epochs": [0, 0.1], "equal": ["parameters"]}
    (root / "params.yaml").write_text(yaml.safe_dump(ALL | {"budgets": asked}))
    cell, result = "runs/pets/resnet18/nemo-0", "results/tiny/pets/resnet18/nemo-0.json"
    assert call(root, f"run {CELL}").splitlines()[:-1] == [f"{cell}/budgets", result]
    rows = read_result(root / result).extras["budgets"]
    assert [(row["competitor"], row["epochs"]) for row in rows] == [
        ("module", 0), ("module", 0.1), ("random", 0), ("random", 0.1)
    ]  # fmt: skip
    assert call(root, f"run {CELL}").splitlines()[:-1] == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on(by_stages: Path, tmp_path: Path, number: int) -> None:
    root = make(tmp_path / "project")
    running = start(root, f"run {CELL}")
    while not (root / "runs/pets/resnet18/nemo-0/masks").is_dir():
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    running.send_signal(number)
    assert running.wait() != 0
    running.communicate()
    again = start(root, f"run {CELL}")
    said = again.communicate(timeout=200)[0].splitlines()
    assert again.returncode == 0, said
    assert "data/pets" not in said
    assert "runs/pets/resnet18/nemo-0/train" not in said
    mine, theirs = made(root), made(by_stages)
    assert mine == {name: theirs[name] for name in mine}
    assert "results/tiny/pets/resnet18/nemo-0.json" in mine
    assert not list(root.rglob("*.partial"))
