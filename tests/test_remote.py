"""A second clone takes from a shared DVC remote what the first one computed.

The pipeline is the real dvc.yaml and its plan; the other stages only note that they ran, and write
a line.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_pipeline import ROOT, dvc, outputs

STAGE = """
import json, os
from pathlib import Path

name = os.environ["DVC_STAGE"]
with open(os.environ["RAN"], "a") as file:
    file.write(name + "\\n")
for out in map(Path, json.loads(Path("outs.json").read_text())[name]):
    path = out if out.suffix else out / "file"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name + Path("params.yaml").read_text())
"""


def git(root, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, timeout=60)


def set_tau(root, tau):
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["loss"]["tau"] = tau
    (root / "params.yaml").write_text(yaml.safe_dump(params))


def set_subsets(root, *subsets):
    params = yaml.safe_load((root / "params.yaml").read_text())
    text = yaml.safe_dump(params | {"subsets": list(subsets)}, allow_unicode=True)
    (root / "params.yaml").write_text(text)
    (root / "outs.json").write_text(json.dumps(outputs(root)))


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Forgets and returns the stages that ran since the last call."""
    file = tmp_path / "ran"
    monkeypatch.setenv("RAN", str(file))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    def names():
        found = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return sorted(found)

    return names


@pytest.fixture
def first(tmp_path):
    """A repository with the pipeline, one model, and a remote in a folder."""
    root = tmp_path / "first"
    (root / ".dvc").mkdir(parents=True)
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config"):
        shutil.copy(ROOT / name, root / name)
    for name in ("nemo", "stages", "plugins", "subsets"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (root / "stages").glob("*.py"):
        if file.stem not in ("__init__", "common", "plan"):
            file.write_text(STAGE)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    small = {"models": ["resnet18"], "methods": ["standard", "mwt", "nemo"], "subsets": ["0+1"]}
    (root / "params.yaml").write_text(yaml.safe_dump(params | small))
    git(root, "init", "-q")
    (root / "outs.json").write_text(json.dumps(outputs(root)))
    dvc(root, "remote", "add", "-q", "-d", "shared", str(tmp_path / "remote"))
    return root


def test_a_second_clone_skips_what_the_first_computed(first, tmp_path, ran):
    every = sorted(json.loads((first / "outs.json").read_text()))
    dvc(first, "repro")
    assert ran() == [name for name in every if name != "plan"]
    git(first, "add", "-A")
    git(first, "commit", "-q", "-m", "results")
    dvc(first, "push", "--run-cache")  # sends the outputs that the workspace has at that time
    set_tau(first, 0.5)  # a run whose dvc.lock is never committed: only the run cache knows it
    dvc(first, "repro")
    assert "train@digits-resnet18-nemo-0" in ran()
    of_tau = outputs_of(first)
    dvc(first, "push", "--run-cache")

    second = tmp_path / "second"
    git(tmp_path, "clone", "-q", str(first), str(second))
    assert not (second / "runs").exists()
    dvc(second, "repro", "--pull")
    assert ran() == []
    assert set(outputs_of(second)) == set(of_tau)
    set_tau(second, 0.5)
    dvc(second, "repro", "--pull")
    # what is in git is not in the cache: results and tables
    assert ran() == ["evaluate@digits-resnet18-nemo-0", "report"]
    assert outputs_of(second) == of_tau


def test_what_a_given_up_subset_left_is_no_dependency(first, tmp_path, ran):
    cell = first / "runs/digits/resnet18/nemo-0"
    set_subsets(first, "0+1", "0-2+7")
    dvc(first, "repro")
    assert "finetune@digits-resnet18-nemo-0-0-2+7" in ran()
    by_hand = cell / "modules/2+3"  # of `nemo decompose`: DVC has no copy of it
    by_hand.mkdir()
    (by_hand / "module.json").write_text("{}")
    set_subsets(first, "0-2+7", "4+5")
    dvc(first, "repro")
    left = {folder.name for folder in cell.glob("*/*") if folder.is_dir()}
    assert left == {"0-2+7", "4+5", "2+3"}
    shutil.rmtree(by_hand)
    dvc(first, "repro")
    git(first, "add", "-A")
    git(first, "commit", "-q", "-m", "another subset")
    dvc(first, "push")
    second = tmp_path / "second"
    git(tmp_path, "clone", "-q", str(first), str(second))
    dvc(second, "pull")
    assert dvc(second, "status").strip() == "Data and pipelines are up to date."
    assert outputs_of(second) == outputs_of(first)
    ran()
    dvc(second, "repro")
    assert ran() == []


def outputs_of(root):
    """Path to content of everything that the stages wrote."""
    folders = ("data", "runs", "results", "reports")
    files = [file for name in folders for file in (root / name).rglob("*") if file.is_file()]
    return {str(file.relative_to(root)): file.read_text() for file in files}
